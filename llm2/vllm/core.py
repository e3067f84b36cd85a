"""System 2 for an engine that runs System 1: guided logits for the rows of a batch. Does not import vllm.

The engine owns the batch. Its rows come in any order; sequences join, leave, come back after a preemption, or are still
within their prompt. `VerifierBatch` keeps what System 2 has read of each sequence in a slot of a cache of fixed size.
A step reads what is unread, with the candidates behind it as branches. The chosen token is read again with the next
unread ones: moving its branch into place would save nothing, since the forward has to be run anyway.

Letters: R rows of a step, n of them guided, K candidates, V vocabulary.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from llm2.common.prefix import common_prefix
from llm2.config import GuidanceConfig
from llm2.decoding.candidates import guided_logits, plausible
from llm2.decoding.forward_batch import Chunk
from llm2.decoding.kv_cache import SlotCache
from llm2.decoding.model_runner import OneDNNLinear, VerifierRunner
from llm2.decoding.prefix_cache import MIN_PREFIX_TOKENS
from llm2.verifier.model import ProcessVerifier

MAX_BRANCHES = 64  # candidates of a sequence in one forward; more take several

logger = logging.getLogger(__name__)
started = time.time()
total: Counter[str | float] = Counter()  # of all batches of this process: see `counts`


def counts() -> dict[str, Any]:
    """What guidance has done in this process: rows of logits guided with each beta, at least one a token written;
    System 2's forwards and the tokens read in them, none for a prefix head."""
    betas = {f"{beta:g}": rows for beta, rows in total.items() if not isinstance(beta, str)}
    forwards = {key: total[key] for key in ("verifier_forwards", "verifier_tokens")}
    return {"started": started, "guided_tokens": betas, **forwards}


@dataclass(eq=False)
class GuidedSequence:
    """A sequence in flight, or the last one of a free slot."""

    slot: int
    guidance: GuidanceConfig
    token_ids: list[int] = field(default_factory=list)  # tokens reported so far; grows at the end
    num_read: int = 0  # of token_ids, whose keys and values the slot holds
    has_nonfinite_score: bool = False  # an error was logged for it


class Proposals(NamedTuple):
    """Rows of one step with equal alpha and top_k."""

    rows: torch.Tensor  # (n,) of the logits
    sequences: Sequence[GuidedSequence]
    candidates: torch.Tensor  # (n, K)
    valid: torch.Tensor  # (n, K)


class GuidedBatch(ABC):
    """Guides rows of logits; a subclass says how candidates are scored."""

    reads_tokens: bool  # whether sequences need their token_ids

    @torch.inference_mode()
    def guide(self, logits: torch.Tensor, rows: Sequence[tuple[int, GuidedSequence]]) -> None:
        """Replace System 1's logits (R, V) float32, in the given rows, by guided ones, -inf where not plausible.

        A row with a score that is not finite gets System 1's on its candidates, and an error is logged once for each
        sequence: an exception here would end all requests of a server.
        """
        groups: dict[tuple[float, int | None], list[tuple[int, GuidedSequence]]] = {}
        for row, sequence in rows:
            groups.setdefault((sequence.guidance.alpha, sequence.guidance.top_k), []).append((row, sequence))
        proposals = []
        for (alpha, top_k), members in groups.items():
            total.update(sequence.guidance.beta for _, sequence in members)
            index = torch.tensor([row for row, _ in members], device=logits.device)  # (n,)
            candidates = plausible(logits[index], alpha, top_k)  # (n, K), (n, K)
            proposals.append(Proposals(index, [sequence for _, sequence in members], *candidates))
        for proposal, scores in zip(proposals, self.score(proposals), strict=True):
            finite = scores.isfinite().all(dim=-1)  # (n,)
            for sequence, fine in zip(proposal.sequences, finite.tolist(), strict=True):
                if not (fine or sequence.has_nonfinite_score):
                    sequence.has_nonfinite_score = True
                    logger.error(
                        "a score of System 2 is not finite at token %d of a request: such tokens are chosen by "
                        "System 1 alone; try dtype=float32",
                        len(sequence.token_ids),
                    )
            beta = torch.tensor([[sequence.guidance.beta] for sequence in proposal.sequences], device=logits.device)
            _write(logits, proposal, scores.masked_fill(~finite[:, None], 0.0), beta)

    @abstractmethod
    def score(self, proposals: Sequence[Proposals]) -> Sequence[torch.Tensor]:
        """Scores (n, K) float32 of each group's candidates; any finite ones where there is no choice."""

    @abstractmethod
    def join(self, guidance: GuidanceConfig, token_ids: Sequence[int]) -> GuidedSequence:
        """A new sequence, or one that comes back."""

    @abstractmethod
    def leave(self, sequence: GuidedSequence) -> None:
        """The sequence is finished, aborted or preempted."""

    @abstractmethod
    def stats(self) -> dict[str, int]:
        """For the engine's log."""


class Read(NamedTuple):
    """One sequence's part of a forward of System 2, and where the scores of its candidates go."""

    chunk: Chunk
    sequence: GuidedSequence
    candidates: Sequence[int] = ()
    offset: int = 0


class VerifierBatch(GuidedBatch):
    """System 2 and its cache. All memory is allocated here.

    Args:
        num_slots: guided sequences in flight.
        max_len: tokens of a sequence.
        max_tokens: tokens of a forward.
    """

    reads_tokens = True

    def __init__(self, verifier: ProcessVerifier, num_slots: int, max_len: int, max_tokens: int = 8_192) -> None:
        self.runner, self.max_tokens = VerifierRunner(verifier), max(max_tokens, 2 * MAX_BRANCHES)
        _prepack(self.runner.body)
        self.cache = SlotCache(num_slots, max_len + MAX_BRANCHES + 1)  # the last position is for padding
        self.free_slots = deque(range(num_slots))  # the one that was freed first is taken first
        self.occupants: list[GuidedSequence | None] = [None] * num_slots  # whose tokens a slot holds
        self.tokens_read = -1  # the first one allocates the layers of the cache
        self._forward([Read(Chunk(0, 0, [0]), GuidedSequence(0, GuidanceConfig()))])

    def join(self, guidance: GuidanceConfig, token_ids: Sequence[int]) -> GuidedSequence:
        return GuidedSequence(self.free_slots.popleft(), guidance, list(token_ids))

    def leave(self, sequence: GuidedSequence) -> None:
        """Free the slot. What was read stays until another sequence takes the slot: a later one may begin alike."""
        self.free_slots.append(sequence.slot)

    def stats(self) -> dict[str, int]:
        return {"free_slots": len(self.free_slots), "tokens_read": self.tokens_read}

    def score(self, proposals: Sequence[Proposals]) -> Sequence[torch.Tensor]:
        sizes = [proposal.candidates.numel() for proposal in proposals]
        flat = torch.zeros(sum(sizes), device=self.runner.device)  # of all groups, so that a forward writes once
        pending, offset = [], 0
        for _, sequences, candidates, valid in proposals:
            counts = zip(sequences, candidates.tolist(), valid.sum(dim=-1).tolist(), strict=True)
            for row, (sequence, tokens, size) in enumerate(counts):
                if size > 1 and sequence.guidance.beta:
                    pending.append((sequence, tokens[:size], offset + row * candidates.shape[1]))
            offset += candidates.numel()
        self._share_prefixes([sequence for sequence, _, _ in pending])
        self._run([self._reads(sequence, len(sequence.token_ids), *rest) for sequence, *rest in pending], flat)
        return [part.view_as(proposal.candidates) for part, proposal in zip(flat.split(sizes), proposals, strict=True)]

    def _share_prefixes(self, sequences: Sequence[GuidedSequence]) -> None:
        """Copy to sequences of which nothing was read yet their longest common prefix with any other, read once."""
        leaders: dict[GuidedSequence, int] = {}  # new ones, with how much of them others wait for
        followers = []
        for sequence in sequences:
            if self.occupants[sequence.slot] is sequence:
                continue
            shared, donor = 0, None
            for other in self.occupants:
                if other is not None:
                    length = _shared(sequence, other, len(other.token_ids) if other in leaders else other.num_read)
                    if length > shared:
                        shared, donor = length, other
            self.occupants[sequence.slot] = sequence
            if donor is not None and shared > donor.num_read:
                leaders[donor] = max(leaders[donor], shared)
                followers.append((donor, sequence, shared))
                continue
            if donor is not None:
                self._copy(donor, sequence, shared)
            leaders[sequence] = 0
        self._run([self._reads(sequence, length) for sequence, length in leaders.items() if length])
        for follower in followers:
            self._copy(*follower)

    def _copy(self, donor: GuidedSequence, sequence: GuidedSequence, length: int) -> None:
        if donor.slot != sequence.slot:
            self.cache.copy_slot(donor.slot, sequence.slot, length)
        sequence.num_read = length

    def _reads(
        self, sequence: GuidedSequence, end: int, candidates: Sequence[int] = (), offset: int = 0
    ) -> Iterator[Read]:
        """What is unread before `end`, then the candidates, in chunks of which each fits into a forward."""
        step = self.max_tokens - MAX_BRANCHES
        while end - sequence.num_read > step:
            start = sequence.num_read
            yield Read(Chunk(sequence.slot, start, sequence.token_ids[start : start + step]), sequence)
        if not self.runner.reads_candidates:  # they are scored by the last token's state, which is not kept
            start = min(sequence.num_read, end - 1)
            yield Read(Chunk(sequence.slot, start, sequence.token_ids[start:end]), sequence, candidates, offset)
            return
        for first in range(0, max(1, len(candidates)), MAX_BRANCHES):
            start, branches = sequence.num_read, candidates[first : first + MAX_BRANCHES]
            chunk = Chunk(sequence.slot, start, [*sequence.token_ids[start:end], *branches], len(branches))
            yield Read(chunk, sequence, branches, offset + first)

    def _run(self, jobs: Iterable[Iterator[Read]], scores: torch.Tensor | None = None) -> None:
        """Forwards over the reads of each job, one of a job at a time, until all are done."""
        waiting = [(job, read) for job in jobs if (read := next(job, None))]
        while waiting:
            batch, rest, budget = [], [], self.max_tokens
            for job, read in waiting:
                size = len(read.chunk.ids)
                (batch if size <= budget else rest).append((job, read))
                budget -= size if size <= budget else 0
            self._forward([read for _, read in batch], scores)
            waiting = rest + [(job, read) for job, _ in batch if (read := next(job, None))]

    def _forward(self, reads: Sequence[Read], scores: torch.Tensor | None = None) -> None:
        hidden = self.runner.forward(self.cache, [read.chunk for read in reads])
        total.update(verifier_forwards=1, verifier_tokens=sum(len(read.chunk.ids) for read in reads))
        for chunk, sequence, _, _ in reads:
            sequence.num_read = chunk.start + len(chunk.ids) - chunk.branches
            self.tokens_read += len(chunk.ids)
        targets = [read.offset + i for read in reads for i in range(len(read.candidates))]
        if not targets:
            return
        if self.runner.reads_candidates:
            sources = [index for read in reads for index in read.chunk.branch_indices]
        else:
            sources = [read.chunk.last for read in reads for _ in read.candidates]
        tokens = [token for read in reads for token in read.candidates]
        targets, sources, tokens = torch.tensor([targets, sources, tokens], device=hidden.device)
        if self.runner.reads_candidates:
            scores[targets] = self.runner.scores(hidden[sources])
        else:
            scores[targets] = self.runner.prefix_scores(hidden[sources], tokens[:, None]).squeeze(-1)


def _write(logits: torch.Tensor, proposal: Proposals, scores: torch.Tensor, beta: torch.Tensor) -> None:
    """z + beta * s on the candidates, -inf elsewhere, in the proposal's rows of logits (R, V); beta (n, 1)."""
    rows, _, candidates, valid = proposal
    guided = guided_logits(logits[rows[:, None], candidates], valid, scores, beta)  # (n, K)
    logits.index_fill_(0, rows, -torch.inf)
    row, column = valid.nonzero(as_tuple=True)
    logits[rows[row], candidates[row, column]] = guided[row, column]


def _prepack(body: nn.Module) -> None:
    """On a CPU in float32, keep the weights of linear layers in oneDNN's layout, which takes half the time."""
    for name, layer in list(body.named_modules()):
        if isinstance(layer, nn.Linear) and layer.bias is None and layer.weight.type() == "torch.FloatTensor":
            body.set_submodule(name, OneDNNLinear(layer.weight))


def _shared(sequence: GuidedSequence, other: GuidedSequence, length: int) -> int:
    """Tokens of the common prefix, at most the first `length` of the other's and all but the last; 0 if too few."""
    start = sequence.token_ids[:MIN_PREFIX_TOKENS]
    if length < MIN_PREFIX_TOKENS or start != other.token_ids[:MIN_PREFIX_TOKENS]:
        return 0
    shared = min(common_prefix(sequence.token_ids, other.token_ids), length, len(sequence.token_ids) - 1)
    return shared if shared >= MIN_PREFIX_TOKENS else 0
