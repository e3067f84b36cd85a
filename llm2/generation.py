"""Guided decoding, a ladder of small steps: prefill, propose, verify, choose, advance, drop.

Knows two models, their caches, and a batch of rows being written. Greedy and sampling differ in `choose` alone; plain
decoding is the same ladder without System 2. Knows nothing of tokenizers, benchmarks or files.

Letters: B prompts, R rows being written, T trunk columns (prompt and what was written, left-padded), V vocabulary,
K candidates, N trunk columns that System 2 has not seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, TemperatureLogitsWarper, TopPLogitsWarper

from llm2.branches import branch
from llm2.cache import GrowingCache
from llm2.candidates import guided_logits, plausible
from llm2.models import eos_ids, load_system1, load_tokenizer, pick_device
from llm2.seeds import row_seed, uniforms
from llm2.verifier import ProcessVerifier, load_verifier, refuse_sliding_window

DROP_SHARE = 0.25  # finished rows leave when they are this share of the batch: leaving copies the caches once


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How System 2 takes part. Source: arXiv 2412.20372; alpha 0.1 and beta 0.25 are the paper's."""

    verifier: ProcessVerifier
    alpha: float = 0.1  # a token is a candidate from alpha times the top probability
    beta: float = 0.25  # weight of the verifier's score
    top_k: int | None = None  # at most so many candidates


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Drawing in place of argmax; temperature and top_p act on the guided logits."""

    temperature: float = 1.0
    top_p: float = 1.0

    def warp(self, logits: torch.Tensor) -> torch.Tensor:
        """(R, C) -> (R, C). transformers' own warpers, which do not look at the ids."""
        if self.temperature != 1.0:
            logits = TemperatureLogitsWarper(self.temperature)(None, logits)
        return TopPLogitsWarper(self.top_p)(None, logits) if self.top_p < 1.0 else logits


class Decoded(NamedTuple):
    """What was written, one entry a row; row b * num_return_sequences + i is sample i of prompt b."""

    tokens: list[list[int]]  # new token ids, the end-of-sequence token included where it was reached
    verified: list[int]  # System 2's forwards in which the row took part


@dataclass
class Rows:
    """The rows still being written."""

    index: torch.Tensor  # (R,) which row of the output each one is
    mask: torch.Tensor  # (R, T) False on left padding
    logits: torch.Tensor  # (R, V) System 1's, for the token to be chosen
    system1: GrowingCache  # T columns
    system2: GrowingCache | None  # T - N columns
    pending: torch.Tensor  # (R, N) ids of the last N trunk columns

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows (a tensor of indices), as often as they are named."""
        self.index, self.mask = self.index[rows], self.mask[rows]
        self.logits, self.pending = self.logits[rows], self.pending[rows]
        for cache in (self.system1, self.system2):
            if cache is not None:
                cache.select_rows(rows)


@torch.inference_mode()
def decode(
    system1: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos: Sequence[int],
    guidance: Guidance | None = None,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    num_return_sequences: int = 1,
) -> Decoded:
    """Continue a batch of prompts until an end-of-sequence token or the limit.

    Args:
        prompts: B lists of token ids of any lengths, none empty.
        guidance: None for System 1 alone.
        sampling: None for greedy.
        seeds: with sampling, one a row (B * num_return_sequences, sample by sample); a row's tokens depend on its seed
            and prompt alone, not on the rest of the batch.
        num_return_sequences: rows a prompt, from one prefill.
    """
    device = system1.device
    total = len(prompts) * num_return_sequences
    if sampling is not None and (seeds is None or len(seeds) != total):
        raise ValueError(f"sampling wants one seed a row: expected {total}, found {len(seeds or [])}")
    ends = torch.tensor(list(eos), device=device)
    row_seeds = torch.tensor(list(seeds), device=device) if sampling is not None else None
    written = torch.zeros(total, max_new_tokens, dtype=torch.long, device=device)
    lengths = torch.zeros(total, dtype=torch.long, device=device)
    verified = torch.zeros(total, dtype=torch.long, device=device)

    rows = prefill(system1, guidance, prompts)
    if num_return_sequences > 1:
        rows.select(torch.arange(len(prompts), device=device).repeat_interleave(num_return_sequences))
    rows.index = torch.arange(total, device=device)
    going = torch.ones_like(rows.index, dtype=torch.bool)  # (R,)
    for step in range(max_new_tokens):
        uniform = None if sampling is None else uniforms(row_seeds[rows.index], step)
        tokens, asked = next_tokens(rows, guidance, sampling, uniform)
        written[rows.index[going], step] = tokens[going]
        lengths[rows.index[going]] = step + 1
        verified[rows.index[going]] += asked
        going = going & ~torch.isin(tokens, ends)
        remaining = int(going.sum())
        if remaining == 0 or step + 1 == max_new_tokens:
            break
        if remaining <= (1 - DROP_SHARE) * going.shape[0]:
            kept = going.nonzero().squeeze(-1)
            rows.select(kept)
            tokens, going = tokens[kept], going[kept]
        advance(system1, rows, tokens)
    return Decoded([row[:n] for row, n in zip(written.tolist(), lengths.tolist(), strict=True)], verified.tolist())


def prefill(system1: PreTrainedModel, guidance: Guidance | None, prompts: Sequence[Sequence[int]]) -> Rows:
    """Left-pad and read the prompts once; System 2 reads all but their last token, so that its queue is never empty."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=system1.device)
    mask = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], device=system1.device)
    refuse_sliding_window(system1.config, longest)
    rows = Rows(
        index=torch.arange(len(prompts), device=system1.device),
        mask=mask,
        logits=torch.empty(0),
        system1=GrowingCache(),
        system2=None if guidance is None else GrowingCache(),
        pending=ids[:, -1:],
    )
    rows.logits = read(system1, mask, ids, rows.system1, logits_to_keep=1).logits[:, -1].float()
    if guidance is not None and longest > 1:
        read(guidance.verifier, mask[:, :-1], ids[:, :-1], rows.system2)
    return rows


def next_tokens(
    rows: Rows, guidance: Guidance | None, sampling: Sampling | None, uniform: torch.Tensor | None
) -> tuple[torch.Tensor, bool]:
    """The token of each row (R,), and whether System 2 was asked. It is asked only where some row has a choice."""
    if guidance is None:
        return choose(rows.logits, sampling, uniform), False
    candidates, valid = plausible(rows.logits, guidance.alpha, guidance.top_k)  # (R, K)
    asked = candidates.shape[1] > 1
    scores = verify(guidance.verifier, rows, candidates) if asked else None
    logits = guided_logits(rows.logits, candidates, valid, scores, guidance.beta)  # (R, K)
    choice = choose(logits, sampling, uniform)  # (R,)
    if asked:
        rows.system2.keep_branch(candidates.shape[1], choice)
        rows.pending = rows.pending[:, :0]
    return candidates.gather(-1, choice[:, None]).squeeze(-1), asked


def verify(verifier: ProcessVerifier, rows: Rows, candidates: torch.Tensor) -> torch.Tensor:
    """Scores (R, K) of all candidates in one forward, which also catches up on the pending tokens.

    Afterwards the cache holds the trunk and then the K branches; the caller keeps one of them.
    """
    slots = torch.full_like(candidates, rows.mask.shape[1])
    output = read(verifier, rows.mask, rows.pending, rows.system2, candidates, slots)
    return output.scores[:, -candidates.shape[1] :].float()


def choose(logits: torch.Tensor, sampling: Sampling | None, uniform: torch.Tensor | None) -> torch.Tensor:
    """A column a row, (R,): the largest, or the one in which `uniform` (R,) falls on the distribution's scale."""
    if sampling is None:
        return logits.argmax(dim=-1)
    # float64: over a vocabulary of 100,000 the rounding of a float32 running sum would be a probability of its own
    scale = sampling.warp(logits).softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)  # (R, C)
    return torch.searchsorted(scale, uniform[:, None].double() * scale[:, -1:], right=True).squeeze(-1)


def advance(system1: PreTrainedModel, rows: Rows, tokens: torch.Tensor) -> None:
    """System 1 reads the chosen tokens (R,); System 2 will when it is next asked."""
    column = tokens[:, None]
    rows.mask = torch.nn.functional.pad(rows.mask, (0, 1), value=True)
    rows.logits = read(system1, rows.mask, column, rows.system1, logits_to_keep=1).logits[:, -1].float()
    if rows.system2 is not None and rows.system2.get_seq_length() < rows.mask.shape[1]:
        rows.pending = torch.cat([rows.pending, column], dim=-1)


def read(
    model: PreTrainedModel,
    mask: torch.Tensor,
    new_ids: torch.Tensor,
    cache: GrowingCache,
    branch_ids: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    **options,
):
    """One forward over new trunk columns (R, N) and branches (R, P) behind what the cache holds."""
    nothing = new_ids[:, :0]
    laid = branch(mask, new_ids, nothing if branch_ids is None else branch_ids, nothing if slots is None else slots)
    return model(
        input_ids=laid.input_ids,
        position_ids=laid.position_ids,
        attention_mask=laid.mask_for(model),
        past_key_values=cache,
        use_cache=True,
        **options,
    )


class LLM2:
    """System 1 and System 2 behind the interface of transformers' `generate`.

    llm2 = LLM2.from_pretrained("meta-llama/Llama-3.2-1B-Instruct", "results/llama-3.2-1b-instruct/verifier")
    inputs = llm2.tokenizer(["..."], return_tensors="pt", padding=True, padding_side="left")
    sequences = llm2.generate(**inputs, max_new_tokens=512)
    """

    def __init__(
        self,
        system1: PreTrainedModel,
        tokenizer,
        verifier: ProcessVerifier | None = None,
        alpha: float = 0.1,
        beta: float = 0.25,
        top_k: int | None = None,
    ) -> None:
        self.system1, self.tokenizer = system1, tokenizer
        self.eos = eos_ids(system1, tokenizer)
        self.guidance = None if verifier is None else Guidance(verifier=verifier, alpha=alpha, beta=beta, top_k=top_k)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        verifier: str | None = None,
        alpha: float = 0.1,
        beta: float = 0.25,
        top_k: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> "LLM2":
        """Load both systems from folders or hub ids; without a verifier System 1 decodes alone."""
        place = pick_device(device)
        system1 = load_system1(model, place, dtype)
        system2 = None if verifier is None else load_verifier(verifier, place, dtype, system1.config.vocab_size)
        return cls(system1, load_tokenizer(model), system2, alpha, beta, top_k)

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int = 512,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        num_return_sequences: int = 1,
        seed: int = 0,
    ) -> torch.Tensor:
        """Prompts and what was written, as transformers' `generate` returns them.

        Args:
            input_ids: (B, T), left-padded where `attention_mask` (B, T) is 0.
            seed: with do_sample, sample i of row b is drawn from a seed made of (seed, b, i).

        Returns:
            (B * num_return_sequences, T + new), right-padded with the tokenizer's pad token.
        """
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        decoded = decode(
            self.system1,
            [row[real.bool()].tolist() for row, real in zip(input_ids, keep, strict=True)],
            max_new_tokens=max_new_tokens,
            eos=self.eos,
            guidance=self.guidance,
            sampling=Sampling(temperature=temperature, top_p=top_p) if do_sample else None,
            seeds=[row_seed(seed, b, i) for b in range(len(input_ids)) for i in range(num_return_sequences)],
            num_return_sequences=num_return_sequences,
        )
        longest = max(map(len, decoded.tokens))
        pad = self.tokenizer.pad_token_id
        new = torch.tensor([tokens + [pad] * (longest - len(tokens)) for tokens in decoded.tokens])
        return torch.cat([input_ids.repeat_interleave(num_return_sequences, dim=0), new.to(input_ids.device)], dim=-1)
