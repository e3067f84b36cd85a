"""A token is drawn by the inverse of the cumulative distribution, in float64, whatever the vocabulary."""

import pytest
import torch

from llm2.decoding.sampling import SamplingParams, sample

ROWS = 64


def expected(logits: torch.Tensor, uniform: torch.Tensor) -> list[int]:
    cumulative = logits.double().softmax(-1).cumsum(-1)
    index = torch.searchsorted(cumulative, uniform[:, None].double() * cumulative[:, -1:], right=True)[:, 0]
    return torch.where(logits.isfinite().all(-1) | logits.isneginf().any(-1), index, logits.argmax(-1)).tolist()


@pytest.mark.parametrize("vocabulary", [300, 4_096, 5_001, 49_152])
@pytest.mark.parametrize("spread", [0.0, 0.3, 4.0, 40.0])
def test_draws_are_those_of_a_float64_sum(vocabulary, spread):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = spread * torch.randn(ROWS, vocabulary, generator=generator)
    uniform = torch.rand(ROWS, generator=generator)
    uniform[:3] = torch.tensor([0.0, 1 - 2**-24, 0.5])
    assert sample(logits, SamplingParams(), uniform).tolist() == expected(logits, uniform)


def test_a_draw_at_the_edge_between_two_tokens_is_exact():
    """Points within float32's rounding of a token's first one, on either side."""
    logits = torch.randn(1, 8_192, generator=torch.Generator().manual_seed(0)).expand(2_000, -1)
    edges = logits[0].double().softmax(-1).cumsum(-1)[::5]
    uniform = (edges[:1_000].float().repeat(2) + torch.tensor([0.0, 6e-8]).repeat_interleave(1_000)).clamp(0, 0.999)
    logits = logits[: len(uniform)]
    assert sample(logits, SamplingParams(), uniform).tolist() == expected(logits, uniform)


def test_tokens_without_probability_are_never_drawn_and_a_nan_is_found():
    logits = torch.full((3, 4_096), -torch.inf)
    logits[0, 77] = logits[1, 4_095] = 0.0
    logits[2] = 0.0
    logits[2, 9] = torch.nan
    assert sample(logits, SamplingParams(), torch.tensor([0.0, 0.9, 0.5])).tolist() == [77, 4_095, 9]
