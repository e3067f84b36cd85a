"""How a token is chosen: by which system, greedily or drawn, and what is told of it afterwards.

Letters: n rows, C columns, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llm2.verifier.model import ProcessVerifier


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How System 2 takes part. Source: arXiv 2412.20372; alpha 0.1 and beta 0.25 are the paper's."""

    verifier: ProcessVerifier
    alpha: float = 0.1  # a token is a candidate from alpha times the top probability
    beta: float = 0.25  # weight of the verifier's score
    top_k: int | None = None  # at most so many candidates
    lazy: bool = True  # ask only where there is more than one candidate; False asks at every token, for the same result
    shared: bool = True  # a LoRA verifier reads in System 1's forwards; False gives it forwards of its own
    patience: float = 0.0  # System 2 is asked when this share of the rows in flight waits for it; the others go on


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Drawing in place of argmax; all of it acts on the guided logits."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float | None = None

    def warpers(self) -> LogitsProcessorList:
        """transformers' own, in `generate`'s order; they do not look at the ids."""
        warpers = LogitsProcessorList()
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            warpers.append(MinPLogitsWarper(self.min_p))
        return warpers


class TokenTrace(NamedTuple):
    """How one token came about."""

    candidates: list[int]  # token ids, best first by System 1
    logprobs: list[float]  # System 1's log-probabilities of them
    scores: list[float] | None  # the verifier's; None where it was not asked
    chosen: int  # which of them was written
    changed: bool  # whether the same argmax, or draw, would have fallen on another one without System 2
    logits: torch.Tensor | None = None  # (V,) System 1's, where they were asked for


class Completion(NamedTuple):
    """What one row became."""

    token_ids: list[int]  # new token ids, the end-of-sequence token included where it was reached
    num_verifier_calls: int  # System 2's forwards in which the row took part
    trace: list[TokenTrace] | None = None  # one a token, where it was asked for


def draw(logits: torch.Tensor, sampling: SamplingParams | None, uniform: torch.Tensor | None) -> torch.Tensor:
    """A column a row, (n,): the largest, or the one in which `uniform` (n,) falls on the distribution's scale."""
    if sampling is None:
        return logits.argmax(dim=-1)
    # float64: over a vocabulary of 100,000 the rounding of a float32 running sum would be a probability of its own
    scale = sampling.warpers()(None, logits).softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)  # (n, C)
    return torch.searchsorted(scale, uniform[:, None].double() * scale[:, -1:], right=True).squeeze(-1)
