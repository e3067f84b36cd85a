"""What a caller hands to the decoder and gets back, and how a token is sampled.

Letters: n sequences, K candidates, V vocabulary.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from pydantic import ValidationError
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llm2.config import GuidanceConfig
from llm2.decoding.candidates import BLOCK
from llm2.decoding.system2 import System2
from llm2.errors import first_misfit
from llm2.verifier.model import ProcessVerifier

MIN_BLOCKED = 4_096  # smaller vocabularies are summed as they are
ROUNDING = 2e-6  # several times the error of a cumulative probability that float32 has summed by blocks

COLDEST = 1e-30  # temperatures below it would make infinite logits, and are greedy as it is

StopFn = Callable[[int, int, list[int]], bool]
LogitsFn = Callable[[list[int], list[list[int]], torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Guidance(GuidanceConfig):
    """How the verifier takes part: its alpha, beta and top_k (`GuidanceConfig`), and when and how it runs.

    The verifier may also be a language model with System 1's tokenizer, whose logits less System 1's are the scores
    (`system2.contrast`), or another kind of System 2 (`system2.System2`). The last three change the speed only. A beta
    of None becomes the verifier's own. Raises ValueError for an alpha, beta or top_k outside its range, and for a beta
    of None where training has not chosen one.
    """

    verifier: ProcessVerifier | PreTrainedModel | System2
    lazy: bool = True  # run it only where there are several candidates; False runs it at every token
    shared: bool = True  # run a LoRA verifier inside System 1's forwards; False runs it in forwards of its own
    verify_fraction: float = 0.0  # run it once this share of the sequences in flight waits for it

    def __post_init__(self) -> None:
        try:
            GuidanceConfig(**self.guidance_kwargs())  # pydantic does not check fields of a plain subclass
        except ValidationError as error:
            raise ValueError(first_misfit(error)) from None
        if self.beta is None and self.verifier is not None:
            beta = self.verifier.config.beta if isinstance(self.verifier, ProcessVerifier) else None
            if beta is None:
                raise ValueError("beta: null, and the verifier names none: its training chose none")
            object.__setattr__(self, "beta", beta)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling instead of argmax; every parameter acts on the guided logits."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float | None = None

    def warpers(self) -> LogitsProcessorList:
        """transformers' warpers in `generate`'s order; none of them reads the input ids."""
        warpers = LogitsProcessorList()
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(max(self.temperature, COLDEST)))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            warpers.append(MinPLogitsWarper(self.min_p))
        return warpers


class Prompt(NamedTuple):
    """A prompt of a request."""

    index: int
    token_ids: Sequence[int]
    seeds: Sequence[int]  # one per sample
    name: str | None = None  # what an error calls it; its index when None


@dataclass(kw_only=True)
class DecodeRequest:
    """One call of the decoder.

    Args:
        prompts: token ids, none empty. Prompts start in this order; neighbours that share a prefix compute it once.
        max_new_tokens: per sequence.
        eos: token ids that end a sequence.
        sampling: None for greedy decoding.
        seeds: for each prompt one seed per sample; one sample per prompt when None. In float32 a sampled sequence
            depends on its prompt and seed alone; in 16 bits, on the batch too: a call repeats itself, and equal prompts
            in another batch may get another text.
        batch_size: sequences in flight; `auto` for as many as fit a GPU's memory. Where memory runs out, fewer.
        stop: called with prompt index, sample index and new tokens after each token; True ends the sequence.
        process_logits: maps prompt indices (n,), new tokens (n lists) and System 1's logits (n, V) to logits (n, V).
        on_token: called with prompt index, sample index and token for each new token.
        names: what an error calls each prompt; its index when None.
        further: called before each step for prompts that join, in turn (token ids, seeds, name); their indices go on.
            A prompt that is longer than all before by more than a quarter may wait until nothing is in flight.
        trace: record a `TokenTrace` per token.
        keep_logits: with trace, record System 1's logits too.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    eos: Collection[int]
    sampling: SamplingParams | None = None
    seeds: Sequence[Sequence[int]] | None = None
    batch_size: int | Literal["auto"] = 64
    stop: StopFn | None = None
    process_logits: LogitsFn | None = None
    on_token: Callable[[int, int, int], None] | None = None
    names: Sequence[str] | None = None
    further: Callable[[], Iterable[tuple[Sequence[int], Sequence[int], str]]] | None = None
    trace: bool = False
    keep_logits: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: found {self.max_new_tokens}, expected at least 1")
        if self.seeds is None:
            if self.sampling is not None:
                raise ValueError("sampling needs seeds: a list for each prompt, found None")
            self.seeds = [[0]] * len(self.prompts)


class KeptLogits(NamedTuple):
    """System 1's logits of one token, (V,) each."""

    raw: torch.Tensor
    processed: torch.Tensor  # by processors, as the plausible set is taken from them


class TokenTrace(NamedTuple):
    """How one token was chosen."""

    candidates: list[int]  # token ids, best first by System 1
    logprobs: list[float]  # System 1's log-probabilities of them
    scores: list[float] | None  # the verifier's; None where it was not called
    chosen: int  # index into the candidates
    changed: bool  # whether the argmax, or the sample, differs from System 1's alone
    logits: KeptLogits | None = None  # with keep_logits


class Completion(NamedTuple):
    """One finished sequence."""

    token_ids: list[int]  # the new tokens, an end-of-sequence token included
    num_verifier_calls: int  # verifier forwards that the sequence took part in
    num_verifier_tokens: int  # that the verifier read in them
    trace: list[TokenTrace] | None = None  # one entry per token, with trace=True


def sample(logits: torch.Tensor, sampling: SamplingParams | None, uniform: torch.Tensor | None) -> torch.Tensor:
    """Index of the chosen column of (n, V) or (n, K) logits, (n,).

    The argmax without `sampling`, else the inverse of the cumulative distribution at `uniform` (n,) in [0, 1). Where
    there is no distribution, the argmax is what spoils it: a NaN or an infinite logit.
    """
    if sampling is None:
        return logits.argmax(dim=-1)
    logits = sampling.warpers()(None, logits)
    wide = logits.device.type == "cpu" and logits.shape[-1] >= MIN_BLOCKED
    return _sample_by_blocks(logits, uniform) if wide else _inverse(logits, uniform)


def _inverse(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    # float64: over 100,000 tokens the rounding errors of a float32 sum would shift the probabilities
    cumulative = logits.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    total = cumulative[:, -1:]
    index = torch.searchsorted(cumulative, uniform[:, None].double() * total, right=True)
    return torch.where(total.isnan(), logits.argmax(dim=-1, keepdim=True), index).squeeze(-1)


def _sample_by_blocks(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """`_inverse` at a sixth of its time: float64 only for sums of blocks, and within the block that is hit.

    Rows where float32's errors could decide, and those without a distribution, are left to `_inverse`.
    """
    weights = logits.softmax(dim=-1, dtype=torch.float32)
    weights = weights.unflatten(-1, (-1, math.gcd(logits.shape[-1], BLOCK)))  # (n, V / block, block)
    ends = weights.sum(dim=-1).double().cumsum(dim=-1)  # (n, V / block)
    point = uniform[:, None].double() * ends[:, -1:]
    block = torch.searchsorted(ends, point, right=True).clamp_(max=ends.shape[-1] - 1)  # (n, 1)
    inside = weights.take_along_dim(block[..., None], dim=1)[:, 0].double()  # (n, block)
    before = ends.gather(-1, block) - inside.sum(dim=-1, keepdim=True)
    bounds = torch.cat([torch.zeros_like(before), inside], dim=-1).cumsum(dim=-1) + before  # (n, block + 1)
    offset = torch.searchsorted(bounds[:, 1:].contiguous(), point, right=True)
    index = (block * inside.shape[-1] + offset).squeeze(-1)
    unsure = ~((bounds - point).abs().amin(dim=-1) > ROUNDING)
    if unsure.any():
        index[unsure] = _inverse(logits[unsure], uniform[unsure])
    return index
