"""Guided decoding, a ladder of small steps: admit, propose, verify, choose, advance, dismiss.

Knows two models, their caches, and the rows being written. Finished rows leave and waiting prompts take their slots;
System 2 is asked only for the rows that have a choice, and catches up there on what it has not read. Greedy and
sampling differ in `choose` alone; plain decoding is the same ladder without System 2. What a row becomes depends on its
prompt and seed, never on the schedule. Knows nothing of tokenizers, benchmarks or files.

Letters: R rows in flight (the first slots of the caches), Q tokens of a forward, V vocabulary, K candidates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, TemperatureLogitsWarper, TopPLogitsWarper

from llm2.branches import mask_for, sees
from llm2.cache import SlotCache
from llm2.candidates import guided_logits, plausible
from llm2.seeds import uniforms
from llm2.verifier import ProcessVerifier, refuse_sliding_window

ADMIT_SHARE = 0.25  # waiting prompts join when this share of the slots is free: joining costs a forward of its own


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


class Written(NamedTuple):
    """What one row became."""

    tokens: list[int]  # new token ids, the end-of-sequence token included where it was reached
    verified: int  # System 2's forwards in which the row took part


class Rows:
    """The rows in flight, in the first `count` slots; every tensor is indexed by slot."""

    def __init__(self, slots: int, columns: int, vocabulary: int, device: torch.device) -> None:
        def integers(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.long, device=device)

        self.count, self.slots = 0, slots
        self.prompt, self.sample = integers(slots), integers(slots)  # which row of whose this is
        self.seed = integers(slots)
        self.ids = integers(slots, columns)  # prompt and what was written
        self.start = integers(slots)  # length of the prompt
        self.length = integers(slots)  # tokens in ids; System 1 has read them all when `logits` is asked for
        self.read = integers(slots)  # tokens that System 2 has read
        self.verified = integers(slots)
        self.logits = torch.zeros(slots, vocabulary, device=device)  # System 1's, for the token to be chosen
        self.system1, self.system2 = SlotCache(slots), SlotCache(slots)

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy rows from slots source (n,) to slots target (n,), which may overlap."""
        width = int(self.length[source].max())
        for state in vars(self).values():
            if isinstance(state, torch.Tensor):
                state[target] = state[source]
        self.system1.copy_rows(source, target, width)
        self.system2.copy_rows(source, target, width)

    def written(self, slot: int) -> Written:
        return Written(self.ids[slot, self.start[slot] : self.length[slot]].tolist(), int(self.verified[slot]))


def decode(system1: PreTrainedModel, prompts: Sequence[Sequence[int]], **options) -> list[list[Written]]:
    """What each prompt's rows became, in order; the arguments are those of `stream`."""
    found = dict(stream(system1, prompts, **options))
    return [found[index] for index in range(len(prompts))]


@torch.inference_mode()
def stream(
    system1: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos: Sequence[int],
    guidance: Guidance | None = None,
    sampling: Sampling | None = None,
    seeds: Sequence[Sequence[int]] | None = None,
    batch_size: int = 64,
) -> Iterator[tuple[int, list[Written]]]:
    """Continue prompts until an end-of-sequence token or the limit; yields a prompt's rows when all are done.

    Args:
        prompts: lists of token ids of any lengths, none empty. They are started in this order.
        guidance: None for System 1 alone.
        sampling: None for greedy.
        seeds: for each prompt a seed a row: rows of a prompt share its prefill. One row a prompt when None. With
            sampling, a row's tokens depend on its prompt and seed alone.
        batch_size: rows in flight; at least the rows of one prompt.
    """
    if sampling is not None and seeds is None:
        raise ValueError("sampling wants seeds: a list for each prompt, found None")
    seeds = [[0]] * len(prompts) if seeds is None else seeds
    columns = max(map(len, prompts), default=0) + max_new_tokens
    refuse_sliding_window(system1.config, columns)
    slots = min(max([batch_size, *map(len, seeds)]), sum(map(len, seeds)))
    rows = Rows(slots, columns, system1.get_output_embeddings().weight.shape[0], system1.device)
    ends = torch.tensor(list(eos), device=system1.device)
    finished: list[dict[int, Written]] = [{} for _ in prompts]
    waiting = 0  # the next prompt to be admitted
    while waiting < len(prompts) or rows.count:
        batch = range(waiting, _fitting(seeds, waiting, rows))
        waiting = batch.stop
        if batch:
            admit(system1, guidance, rows, prompts, seeds, batch)
        write(rows, next_tokens(rows, guidance, sampling))
        for prompt, sample, row in dismiss(rows, ends, max_new_tokens):
            finished[prompt][sample] = row
            if len(finished[prompt]) == len(seeds[prompt]):
                yield prompt, [row for _, row in sorted(finished[prompt].items())]
                finished[prompt].clear()
        if rows.count:
            advance(system1, rows)


def _fitting(seeds: Sequence[Sequence[int]], waiting: int, rows: Rows) -> int:
    """One past the last prompt to admit now: as many as there are slots for, once enough slots are free."""
    free = rows.slots - rows.count
    if rows.count and free < ADMIT_SHARE * rows.slots:
        return waiting
    while waiting < len(seeds) and len(seeds[waiting]) <= free:
        free -= len(seeds[waiting])
        waiting += 1
    return waiting


def admit(
    system1: PreTrainedModel,
    guidance: Guidance | None,
    rows: Rows,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    batch: range,
) -> None:
    """Both systems read the prompts of the batch, each once, into free slots; then each row of a prompt gets a copy."""
    device, first, n = rows.ids.device, rows.count, len(batch)
    ids = pad_sequence([torch.tensor(prompts[i], device=device) for i in batch], batch_first=True)  # (n, Q)
    place = slice(first, first + n)
    rows.ids[place, : ids.shape[1]] = ids
    rows.start[place] = rows.length[place] = rows.read[place] = torch.tensor([len(prompts[i]) for i in batch])
    rows.verified[place] = 0
    columns = torch.arange(ids.shape[1], device=device).expand(n, -1)
    # Of the vocabulary-sized logits only the columns in which some prompt ends are made.
    last, where = torch.unique(rows.length[place] - 1, return_inverse=True)
    output = read(system1, rows.system1, place, ids, columns, columns, logits_to_keep=last)
    rows.logits[place] = output.logits[torch.arange(n, device=device), where].float()
    if guidance is not None:
        read(guidance.verifier, rows.system2, place, ids, columns, columns)

    source = [first + offset for offset, i in enumerate(batch) for _ in seeds[i]]
    rows.count = first + len(source)
    place = slice(first, rows.count)
    if len(source) > n:
        rows.move(torch.tensor(source, device=device), torch.arange(first, rows.count, device=device))
    rows.prompt[place] = torch.tensor([i for i in batch for _ in seeds[i]])
    rows.sample[place] = torch.tensor([sample for i in batch for sample in range(len(seeds[i]))])
    rows.seed[place] = torch.tensor([seed for i in batch for seed in seeds[i]])


def next_tokens(rows: Rows, guidance: Guidance | None, sampling: Sampling | None) -> torch.Tensor:
    """The token of each row, (R,)."""
    busy = slice(0, rows.count)
    uniform = None if sampling is None else uniforms(rows.seed[busy], (rows.length - rows.start)[busy])
    if guidance is None:
        return choose(rows.logits[busy], sampling, uniform)
    candidates, valid = plausible(rows.logits[busy], guidance.alpha, guidance.top_k)  # (R, K)
    asking = (valid.sum(-1) > 1).nonzero().squeeze(-1)
    scores = torch.zeros_like(candidates, dtype=rows.logits.dtype)
    if len(asking):
        scores[asking] = verify(guidance.verifier, rows, asking, candidates[asking])
    choice = choose(guided_logits(rows.logits[busy], candidates, valid, scores, guidance.beta), sampling, uniform)
    if len(asking):
        # The chosen branch becomes the next token of the trunk; the others are written over.
        rows.system2.move_column(asking, rows.length[asking] + choice[asking], rows.length[asking])
        rows.read[asking] = rows.length[asking] + 1
        rows.verified[asking] += 1
    return candidates.gather(-1, choice[:, None]).squeeze(-1)


def verify(verifier: ProcessVerifier, rows: Rows, asking: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Scores (n, K) of the candidates (n, K) of the rows `asking` (n,), in one forward with what they have unread.

    The candidates lie in the columns from the row's length on; what only fills the rectangle lies behind them.
    """
    length, behind = rows.length[asking, None], (rows.length - rows.read)[asking, None]  # (n, 1)
    K, unread = candidates.shape[1], int(behind.max())
    step = torch.arange(unread, device=length.device)  # (Q - K,)
    real = step < behind
    column = rows.read[asking, None] + step  # (n, Q - K)
    trunk = rows.ids[asking[:, None], torch.where(real, column, 0)]
    branch = length + torch.arange(K, device=length.device)  # (n, K)
    own = torch.cat([torch.where(real, column, length + K + step), branch], dim=-1)
    bound = torch.cat([torch.where(real, column, 0), length.expand_as(branch)], dim=-1)
    rest = slice(0, len(asking)) if len(asking) == rows.count else asking
    output = read(verifier, rows.system2, rest, torch.cat([trunk, candidates], dim=-1), own, bound)
    return output.scores[:, unread:].float()


def choose(logits: torch.Tensor, sampling: Sampling | None, uniform: torch.Tensor | None) -> torch.Tensor:
    """A column a row, (R,): the largest, or the one in which `uniform` (R,) falls on the distribution's scale."""
    if sampling is None:
        return logits.argmax(dim=-1)
    # float64: over a vocabulary of 100,000 the rounding of a float32 running sum would be a probability of its own
    scale = sampling.warp(logits).softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)  # (R, C)
    return torch.searchsorted(scale, uniform[:, None].double() * scale[:, -1:], right=True).squeeze(-1)


def write(rows: Rows, tokens: torch.Tensor) -> None:
    """Append the chosen tokens (R,)."""
    slots = torch.arange(rows.count, device=tokens.device)
    rows.ids[slots, rows.length[: rows.count]] = tokens
    rows.length[: rows.count] += 1


def dismiss(rows: Rows, ends: torch.Tensor, max_new_tokens: int) -> list[tuple[int, int, Written]]:
    """Take out the rows that are done, each with its prompt and sample; the last rows move into their slots."""
    busy = slice(0, rows.count)
    last = rows.ids[busy].gather(-1, rows.length[busy, None] - 1).squeeze(-1)
    done = torch.isin(last, ends) | (rows.length[busy] - rows.start[busy] >= max_new_tokens)
    gone = done.nonzero().squeeze(-1).tolist()
    if not gone:
        return []
    leaving = [(int(rows.prompt[slot]), int(rows.sample[slot]), rows.written(slot)) for slot in gone]
    rows.count -= len(gone)
    holes = [slot for slot in gone if slot < rows.count]
    if holes:
        movers = (~done[rows.count :]).nonzero().squeeze(-1) + rows.count
        rows.move(movers, torch.tensor(holes, device=movers.device))
    return leaving


def advance(system1: PreTrainedModel, rows: Rows) -> None:
    """System 1 reads the chosen tokens; System 2 will when it is next asked."""
    busy = slice(0, rows.count)
    column = rows.length[busy, None] - 1  # (R, 1)
    output = read(system1, rows.system1, busy, rows.ids[busy].gather(-1, column), column, column, logits_to_keep=1)
    rows.logits[busy] = output.logits[:, -1].float()


def read(
    model: PreTrainedModel,
    cache: SlotCache,
    rows: slice | torch.Tensor,
    ids: torch.Tensor,
    own: torch.Tensor,
    bound: torch.Tensor,
    **options,
):
    """One forward over tokens ids (n, Q) of these slots, each with its own column and its bound (see `branches`)."""
    width = int(own.max()) + 1
    cache.aim(rows, own, width)
    return model(
        input_ids=ids,
        position_ids=bound,
        attention_mask=mask_for(model, sees(own, bound, width)),
        past_key_values=cache,
        use_cache=True,
        **options,
    )
