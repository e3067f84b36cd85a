"""Cached, batched, branched decoding against the slow twin and against transformers' `generate`."""

import pytest
import torch
from conftest import VOCABULARY
from reference import decode_one, score

from llm2.generation import Guidance, Sampling, decode, prefill, verify

EOS = [1]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("alpha, beta, top_k", [(0.1, 0.25, None), (0.02, 3.0, None), (0.001, 5.0, 2), (0.5, 1.0, 4)])
def test_guided_greedy_equals_the_uncached_reference(system1, verifier, count, alpha, beta, top_k):
    batch = prompts(count, seed=count)
    guidance = Guidance(verifier=verifier, alpha=alpha, beta=beta, top_k=top_k)
    decoded = decode(system1, batch, max_new_tokens=16, eos=EOS, guidance=guidance)
    expected = [
        decode_one(system1, p, max_new_tokens=16, eos=EOS, verifier=verifier, alpha=alpha, beta=beta, top_k=top_k)
        for p in batch
    ]
    assert decoded.tokens == expected


def test_guidance_changes_what_is_written(system1, verifier):
    """Else the tests above would pass with a verifier that is never asked."""
    batch = prompts(7)
    plain = decode(system1, batch, max_new_tokens=16, eos=EOS)
    guided = decode(
        system1, batch, max_new_tokens=16, eos=EOS, guidance=Guidance(verifier=verifier, alpha=0.02, beta=3.0)
    )
    assert sum(a != b for a, b in zip(plain.tokens, guided.tokens, strict=True)) >= 5
    assert sum(guided.verified) > 0 and sum(plain.verified) == 0


def test_batched_decoding_equals_one_by_one(system1, verifier):
    batch = prompts(33)
    guidance = Guidance(verifier=verifier, alpha=0.02, beta=2.0)
    together = decode(system1, batch, max_new_tokens=24, eos=EOS, guidance=guidance).tokens
    alone = [decode(system1, [p], max_new_tokens=24, eos=EOS, guidance=guidance).tokens[0] for p in batch]
    assert together == alone
    assert {len(tokens) for tokens in together} != {24}, "some row must end early, else dropping rows is not tested"


def test_beta_zero_equals_generate(system1, verifier):
    batch = prompts(5)
    longest = max(map(len, batch))
    ids = torch.tensor([[2] * (longest - len(p)) + p for p in batch])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
    expected = system1.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)[:, longest:].tolist()
    for guidance in (None, Guidance(verifier=verifier, alpha=0.1, beta=0.0)):
        tokens = decode(system1, batch, max_new_tokens=20, eos=EOS, guidance=guidance).tokens
        assert [row + [2] * (len(expected[0]) - len(row)) for row in tokens] == expected


@pytest.mark.parametrize("guided", [False, True])
def test_samples_equal_the_reference_and_do_not_depend_on_the_batch(system1, verifier, guided):
    batch, seeds = prompts(4), list(range(100, 112))
    guidance = Guidance(verifier=verifier, alpha=0.05, beta=1.0) if guided else None
    sampling = Sampling(temperature=0.7)
    options = {"max_new_tokens": 12, "eos": EOS, "guidance": guidance, "sampling": sampling}
    together = decode(system1, batch, seeds=seeds, num_return_sequences=3, **options).tokens
    twin = {"verifier": verifier, "alpha": 0.05, "beta": 1.0} if guided else {}
    expected = [
        decode_one(system1, batch[i // 3], max_new_tokens=12, eos=EOS, seed=seed, temperature=0.7, **twin)
        for i, seed in enumerate(seeds)
    ]
    assert together == expected
    alone = [decode(system1, [batch[i // 3]], seeds=[s], **options).tokens[0] for i, s in enumerate(seeds)]
    assert together == alone
    assert len({tuple(tokens) for tokens in together[:3]}) > 1, "samples of a prompt must differ"


def test_sampling_follows_the_distribution(system1):
    """Frequencies of the first token over 4,000 seeds against System 1's probabilities, by a chi-square test."""
    from scipy.stats import chisquare

    prompt = [5, 9, 3]
    decoded = decode(
        system1,
        [prompt],
        max_new_tokens=1,
        eos=EOS,
        sampling=Sampling(),
        seeds=[7919 * i for i in range(4_000)],
        num_return_sequences=4_000,
    )
    counts = torch.bincount(torch.tensor(decoded.tokens).flatten(), minlength=VOCABULARY).double()
    with torch.inference_mode():
        expected = system1(torch.tensor([prompt])).logits[0, -1].double().softmax(-1) * 4_000
    common = expected >= 5  # the usual condition of the test; the rest is one class
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    assert chisquare(observed.numpy(), expected.numpy()).pvalue > 0.001


def test_candidate_scores_equal_each_alone(system1, verifier):
    batch = prompts(6, seed=3)
    rows = prefill(system1, Guidance(verifier=verifier), batch)
    candidates = torch.randint(3, VOCABULARY, (6, 5), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        scores = verify(verifier, rows, candidates)
    expected = [[score(verifier, [*p, v]) for v in row] for p, row in zip(batch, candidates.tolist(), strict=True)]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-4, rtol=0)


def test_sampling_without_seeds_is_refused(system1):
    with pytest.raises(ValueError, match="expected 2, found 0"):
        decode(system1, [[3]], max_new_tokens=2, eos=EOS, sampling=Sampling(), num_return_sequences=2)
