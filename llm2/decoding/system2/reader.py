"""System 2 that reads tokens: what is unread of a sequence, with its candidates behind as branches.

Each sequence has a slot of a cache. Once a token is chosen, its branch moves to the sequence's next position; other
tokens are read with the next candidates. Sequences that begin alike read their prefix once: new ones copy it from any
slot that holds it, be it of a sequence that has left, or read it in place (`Handle.prefix`).
"""

import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from llm2.common.prefix import common_prefix
from llm2.decoding.forward_batch import Chunk
from llm2.decoding.kv_cache import SlotCache
from llm2.decoding.model_runner import SharedRunner, VerifierRunner
from llm2.decoding.prefix_cache import MIN_PREFIX_TOKENS
from llm2.decoding.system2 import Candidates, Handle, System2
from llm2.decoding.system2.contrast import ContrastRunner


class Read(NamedTuple):
    """One sequence's part of a forward, and where its scores go."""

    chunk: Chunk
    handle: Handle
    row: int = 0
    first: int = 0  # column of the first branch
    last: bool = False  # whether candidates are scored by it


class Reader(System2):
    """A verifier, or a language model for contrast, and its part of a cache.

    Args:
        runner: a SharedRunner reads in forwards that System 1 may share, with `begin` and `finish`.
        slots: those of the cache that are its own.
        counts: `system2_forwards` and `system2_tokens` are added to it.
        max_tokens, max_branches: limits of a forward and, in it, of a sequence's candidates; more take several.
        keep_longest: take the slot that was freed first, which keeps what may be shared longest; else the one that was
            freed last, which takes the least memory on a CPU.
    """

    runs_model = True

    def __init__(
        self,
        runner: VerifierRunner | ContrastRunner,
        cache: SlotCache,
        slots: Iterable[int],
        counts: Counter[str],
        max_tokens: int = sys.maxsize,
        max_branches: int = sys.maxsize // 2,
        keep_longest: bool = False,
    ) -> None:
        self.runner, self.cache, self.counts = runner, cache, counts
        self.max_tokens, self.max_branches = max(max_tokens, 2 * max_branches), max_branches
        self.free_slots, self.keep_longest = deque(slots), keep_longest
        self.holders: dict[int, Handle] = {}  # whose tokens a slot holds
        self.chosen: list[Handle] = []  # with a branch to move

    def join(self, token_ids: Sequence[int], prefix: Handle | None = None, prefix_len: int = 0) -> Handle:
        return Handle(list(token_ids), self.free_slots.popleft(), prefix, prefix_len, num_read=prefix_len)

    def leave(self, handle: Handle) -> None:
        """Free the slot. What was read stays until another sequence takes the slot: a later one may begin alike."""
        (self.free_slots.append if self.keep_longest else self.free_slots.appendleft)(handle.slot)

    def commit(self, handle: Handle, tokens: Sequence[int]) -> None:
        if tokens and tokens[0] in handle.branches:
            handle.kept = handle.branches.index(tokens[0])
            self.chosen.append(handle)
        handle.branches = ()
        handle.token_ids += tokens

    def rewind(self, handle: Handle, length: int) -> None:
        if length < len(handle.token_ids):
            del handle.token_ids[length:]
            handle.num_read, handle.branches, handle.kept = min(handle.num_read, length), (), None

    def score(self, handles: Sequence[Handle], candidates: Candidates) -> torch.Tensor:
        scores = torch.zeros(candidates.ids.shape, device=self.runner.device)
        prefixes, jobs = self._jobs(handles, candidates)
        self._run([*prefixes, *jobs], candidates, scores)
        return scores

    def begin(self, handles: Sequence[Handle], candidates: Candidates) -> list[Read]:
        """What has to be read to score these candidates, in one forward."""
        prefixes, jobs = self._jobs(handles, candidates)
        reads = [read for job in (*prefixes, *jobs) for read in job]
        self._count(reads)
        return reads

    def finish(self, hidden: torch.Tensor, reads: Sequence[Read], candidates: Candidates) -> torch.Tensor:
        """The scores, from the hidden states of the forward that has read them."""
        scores = torch.zeros(candidates.ids.shape, device=hidden.device)
        self._finish(hidden, reads, candidates, scores)
        return scores

    def _jobs(
        self, handles: Sequence[Handle], candidates: Candidates
    ) -> tuple[list[Iterator[Read]], list[Iterator[Read]]]:
        self._keep_chosen()
        self._share_prefixes([handle for handle in handles if handle.prefix is None])
        shared = dict.fromkeys(handle.prefix for handle in handles if handle.prefix is not None)
        unread = [prefix for prefix in shared if prefix.num_read < len(prefix.token_ids)]
        prefixes = [self._reads(prefix, len(prefix.token_ids)) for prefix in unread]
        lists = candidates.lists
        return prefixes, [
            self._reads(handle, len(handle.token_ids), *at)
            for handle, *at in zip(handles, lists, range(len(lists)), strict=True)
        ]

    def _keep_chosen(self) -> None:
        """Move each chosen branch to its sequence's next position; the others are overwritten later."""
        moves = []
        for handle in self.chosen:
            if handle.kept is not None:
                target = handle.num_read - handle.prefix_len
                if handle.kept:
                    moves.append((handle.slot, target + handle.kept, target))
                handle.num_read, handle.kept = handle.num_read + 1, None
        self.chosen = []
        if moves:
            self.runner.commit(self.cache, moves)

    def _share_prefixes(self, handles: Sequence[Handle]) -> None:
        """Copy to sequences of which nothing was read yet their longest common prefix with any other, read once."""
        leaders: dict[Handle, int] = {}  # new ones, with how much of them others wait for
        followers = []
        for handle in handles:
            if self.holders.get(handle.slot) is handle:
                continue
            shared, donor = 0, None
            for other in self.holders.values():
                length = _shared(handle, other, len(other.token_ids) if other in leaders else other.num_read)
                if length > shared:
                    shared, donor = length, other
            self.holders[handle.slot] = handle
            if donor is not None and shared > donor.num_read:
                leaders[donor] = max(leaders[donor], shared)
                followers.append((donor, handle, shared))
                continue
            if donor is not None:
                self._copy(donor, handle, shared)
            leaders[handle] = 0
        self._run([self._reads(handle, length) for handle, length in leaders.items() if length])
        for follower in followers:
            self._copy(*follower)

    def _copy(self, donor: Handle, handle: Handle, length: int) -> None:
        if donor.slot != handle.slot:
            self.cache.copy_slot(donor.slot, handle.slot, length)
        handle.num_read = length

    def _reads(self, handle: Handle, end: int, branches: Sequence[int] | None = None, row: int = 0) -> Iterator[Read]:
        """What is unread before `end`, then the candidates if there are any, each part small enough for a forward."""
        step = self.max_tokens - self.max_branches
        self.holders[handle.slot] = handle
        while end - handle.num_read > step:
            yield Read(self._chunk(handle, handle.num_read, handle.num_read + step), handle)
        if branches is None:
            yield Read(self._chunk(handle, handle.num_read, end), handle)
        elif not self.runner.reads_candidates:  # they are scored by the last token's state, which is not kept
            yield Read(self._chunk(handle, min(handle.num_read, end - 1), end), handle, row, last=True)
        else:
            for first in range(0, len(branches), self.max_branches):
                part = branches[first : first + self.max_branches]
                yield Read(self._chunk(handle, handle.num_read, end, part), handle, row, first)

    def _chunk(self, handle: Handle, start: int, end: int, branches: Sequence[int] = ()) -> Chunk:
        prefix = None if handle.prefix is None else (handle.prefix.slot, handle.prefix_len)
        ids = [*handle.token_ids[start:end], *branches]
        handle.num_read, handle.branches = end, branches
        handle.num_tokens += len(ids)
        return Chunk(handle.slot, start - handle.prefix_len, ids, len(branches), prefix)

    def _run(
        self,
        jobs: Iterable[Iterator[Read]],
        candidates: Candidates | None = None,
        scores: torch.Tensor | None = None,
    ) -> None:
        """Forwards over the reads of each job, one of a job at a time, until all are done."""
        waiting = [(job, read) for job in jobs if (read := next(job, None))]
        while waiting:
            batch, rest, budget = [], [], self.max_tokens
            for job, read in waiting:
                size = len(read.chunk.ids)
                (batch if size <= budget else rest).append((job, read))
                budget -= size if size <= budget else 0
            reads = [read for _, read in batch]
            self._count(reads)
            hidden = self._forward([read.chunk for read in reads])
            if candidates is not None:
                self._finish(hidden, reads, candidates, scores)
            waiting = rest + [(job, read) for job, _ in batch if (read := next(job, None))]

    def _forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        if isinstance(self.runner, SharedRunner):
            return self.runner.forward(self.cache, [], chunks)
        return self.runner.forward(self.cache, chunks)

    def _count(self, reads: Sequence[Read]) -> None:
        if reads:
            self.counts.update(system2_forwards=1, system2_tokens=sum(len(read.chunk.ids) for read in reads))

    def _finish(
        self, hidden: torch.Tensor, reads: Sequence[Read], candidates: Candidates, scores: torch.Tensor
    ) -> None:
        if self.runner.reads_candidates:
            found = [
                (read.row, read.first + column, index)
                for read in reads
                for column, index in enumerate(read.chunk.branch_indices)
            ]
            if found:
                rows, columns, indices = torch.tensor(found, device=hidden.device).T
                scores[rows, columns] = self.runner.scores(hidden[indices])
        elif found := [(read.row, read.chunk.last) for read in reads if read.last]:
            rows, indices = torch.tensor(found, device=hidden.device).T
            ids, logits = (part.to(hidden.device)[rows] for part in (candidates.ids, candidates.logits))
            scores[rows] = self.runner.prefix_scores(hidden[indices], ids, logits)


def _shared(handle: Handle, other: Handle, length: int) -> int:
    """Tokens of the common prefix, at most the first `length` of the other's and all but the last; 0 if too few."""
    start = handle.token_ids[:MIN_PREFIX_TOKENS]
    if other.prefix is not None or length < MIN_PREFIX_TOKENS or start != other.token_ids[:MIN_PREFIX_TOKENS]:
        return 0
    shared = min(common_prefix(handle.token_ids, other.token_ids), length, len(handle.token_ids) - 1)
    return shared if shared >= MIN_PREFIX_TOKENS else 0
