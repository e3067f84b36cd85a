"""The rows being written: when they come and go, what each system reads of them, how their tokens are chosen.

Finished rows leave and waiting prompts take their slots; System 2 is asked only where there is a choice, and catches up
there on what it has not read; prompts that begin alike share what they have in common. Where System 2 is a LoRA adapter
on System 1's weights both read in one forward. What a row becomes depends on its prompt and seed alone, never on the
schedule.

Letters: n rows, V vocabulary, K candidates.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch

from llm2.common.seeds import uniforms
from llm2.decoding.candidates import guided_logits, plausible
from llm2.decoding.forward_batch import Piece
from llm2.decoding.kv_cache import ROOM, SlotCache
from llm2.decoding.model_runner import Reader, SharedReader, System1Reader, System2Reader
from llm2.decoding.prefix_cache import Trunk, Trunks
from llm2.decoding.sampling import Guidance, SamplingParams, TokenTrace, draw

LINE = 8_192  # tokens of prompts admitted at once: the memory of a forward is bounded
IN_PLACE = 2_000  # rows times tokens from which a trunk is read in place: below, a copy a row is cheaper to read
Stop = Callable[[int, int, list[int]], bool]
Process = Callable[[list[int], list[list[int]], torch.Tensor], torch.Tensor]


@dataclass(eq=False)
class Row:
    """A sequence being written. Column c of its slots holds own[c]; a trunk's columns stand before."""

    prompt: int  # whose this is
    sample: int
    seed: int
    slot: int
    own: list[int]  # the prompt behind the trunk, and what was written
    start: int  # how much of `own` is the prompt's
    trunk: Trunk | None = None
    bound: int = 0  # the columns of the trunk that belong to this row
    read1: int = 0  # columns that System 1 has read ...
    read2: int = 0  # ... and System 2
    num_verifier_calls: int = 0
    trace: list[TokenTrace] = field(default_factory=list)
    proposal: "Proposal | None" = None  # what waits for System 2
    done: bool = False

    @property
    def new(self) -> list[int]:
        return self.own[self.start :]

    def piece(self, first: int, candidates: Sequence[int] = (), offset: int = 0) -> Piece:
        """The row's tokens from column `first` on, and behind them the candidates as branches."""
        trunk = None if self.trunk is None else (self.trunk.slot + offset, self.bound)
        return Piece(self.slot + offset, first, [*self.own[first:], *candidates], len(candidates), trunk)


class Proposal(NamedTuple):
    """What System 1 would accept as a row's next token, best first."""

    candidates: list[int]
    values: list[float]  # their logits
    logits: torch.Tensor | None  # (V,), where they are to be told


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be written; see `Decoder.stream`."""

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[Sequence[int]]
    max_new_tokens: int
    eos: frozenset[int]
    sampling: SamplingParams | None
    stop: Stop | None
    process: Process | None
    on_token: Callable[[int, int, int], None] | None
    trace: bool
    keep_logits: bool


@dataclass(eq=False)
class Readers:
    """The systems that read."""

    system1: System1Reader
    system2: System2Reader | SharedReader | None  # None for System 1 alone; System 1's own where they share a forward
    guidance: Guidance | None
    counts: Counter[str] = field(default_factory=Counter)  # tokens, candidates; forwards of each system, tokens it read
    kept: tuple[SlotCache, SlotCache] | None = None  # of the last decoding, for the next one

    @property
    def shared(self) -> bool:
        return self.system1 is self.system2

    def caches(self, slots: int, columns: int, offset: int) -> tuple[SlotCache, SlotCache]:
        """One for each system; System 2's rows lie `offset` slots behind System 1's.

        Those that were kept are taken, so that two decodings under way never write to the same ones.
        """
        kept, self.kept = self.kept, None
        if kept is not None and kept[0].slots == slots + offset:
            return kept
        cache1 = SlotCache(slots + offset, columns, (0, offset) if offset else (0,))
        return cache1, cache1 if self.shared else SlotCache(slots, columns)


class Flight:
    """The rows being written, in the first slots of the caches, and what waits for a slot."""

    def __init__(self, readers: Readers, task: Task, slots: int) -> None:
        self.readers, self.guidance, self.task, self.slots = readers, readers.guidance, task, slots
        trunks = max(1, slots // 8)
        self.trunks = Trunks(slots, trunks)
        # Where both systems read in one forward, System 2's slots are the second half of the only cache.
        self.offset = slots + trunks if readers.shared else 0
        self.caches = self.cache1, self.cache2 = readers.caches(slots + trunks, self._room(), self.offset)
        self.rows: list[Row] = []  # a row's place is its slot
        self.waiting = deque((prompt, sample) for prompt, own in enumerate(task.seeds) for sample in range(len(own)))
        self.counts = [len(own) for own in task.seeds]

    def _room(self) -> int:
        """Columns to begin with: where they cost nothing, on a CPU, those of the longest row there may be."""
        if self.readers.system1.device.type != "cpu":
            return 0
        return max(map(len, self.task.prompts), default=0) + self.task.max_new_tokens + ROOM

    # Rows come and go.

    def admit(self) -> None:
        """Waiting rows take the free slots; their prompts are read in the next forward."""
        tokens = 0
        while self.waiting and len(self.rows) < self.slots and tokens < LINE:
            index, sample = self.waiting.popleft()
            prompt = self.task.prompts[index]
            row = Row(index, sample, self.task.seeds[index][sample], len(self.rows), list(prompt), len(prompt))
            if found := self.trunks.of(self.task.prompts, self.counts, index, self.slots):
                self._share(row, *found)
            tokens += len(row.own) - row.read1
            self.rows.append(row)

    def _share(self, row: Row, trunk: Trunk, bound: int, rows: int) -> None:
        """Let the row read its first `bound` tokens from a trunk, in place or as a copy in its own slot."""
        if self.readers.system1.device.type == "cpu" and rows * bound >= IN_PLACE:
            row.trunk, row.bound = trunk, bound
            row.own, row.start = row.own[bound:], row.start - bound
            trunk.users += 1
            return
        self._read(self._unread([trunk], 1), [] if self.guidance is None else self._unread([trunk], 2))
        self.cache1.copy_slot(trunk.slot, row.slot, bound)
        row.read1 = bound
        if self.guidance is not None:
            self.cache2.copy_slot(trunk.slot + self.offset, row.slot + self.offset, bound)
            row.read2 = bound

    def dismiss(self) -> list[Row]:
        """Take out the rows that are done; the last ones move into their slots."""
        done = [row for row in self.rows if row.done]
        for row in done:
            last = self.rows.pop()
            if last is not row:
                self.cache1.copy_slot(last.slot, row.slot, len(last.own))
                if self.guidance is not None:
                    self.cache2.copy_slot(last.slot + self.offset, row.slot + self.offset, last.read2)
                self.rows[row.slot], last.slot = last, row.slot
            if row.trunk is not None:
                row.trunk.users -= 1
        return done

    def land(self) -> None:
        """Leave the caches to the next decoding, where recordings read and write them."""
        if self.readers.system1.recorder is not None:
            self.readers.kept = self.caches

    # The systems read.

    def step(self) -> None:
        """A token more for every row that does not wait for System 2, and for those that do once it is asked."""
        asking = [row for row in self.rows if row.proposal]
        reading = [row for row in self.rows if not row.proposal]
        if reading and len(asking) < self.patience * len(self.rows):
            asking = []
        if self.readers.shared:
            self._step_together(asking, reading)
        else:
            self._step_apart(asking, reading)

    @property
    def patience(self) -> float:
        return 0.0 if self.guidance is None else self.guidance.patience

    def _step_apart(self, asking: list[Row], reading: list[Row]) -> None:
        """System 2 in a forward of its own, then System 1."""
        if asking:
            pieces = [row.piece(row.read2, row.proposal.candidates) for row in asking]
            hidden = self._read([], self._unread([row.trunk for row in asking], 2) + pieces)
            self._choose(asking, self.readers.system2.scores(hidden[_heads(pieces, hidden.device)]))
            reading = reading + [row for row in asking if not row.done]
            reading.sort(key=lambda row: row.slot)
        if reading:
            pieces = [row.piece(row.read1) for row in reading]
            hidden = self._read(self._unread([row.trunk for row in reading], 1) + pieces, [])
            self._propose(reading, hidden, [piece.last for piece in pieces])

    def _step_together(self, asking: list[Row], reading: list[Row]) -> None:
        """Both systems in one forward: System 1 reads the candidates too, so that it is ready behind the winner."""
        pieces = [row.piece(row.read1) for row in reading]
        branches = [row.piece(len(row.own), row.proposal.candidates) for row in asking]
        asked = [row.piece(row.read2, row.proposal.candidates, self.offset) for row in asking]
        hidden = self._read(
            self._unread([row.trunk for row in reading], 1) + pieces + branches,
            self._unread([row.trunk for row in asking], 2) + asked,
        )
        places = [piece.last for piece in pieces]
        if asking:
            choice = self._choose(asking, self.readers.system2.scores(hidden[_heads(asked, hidden.device)]))
            for piece, chosen in zip(branches, choice, strict=True):
                places.append(piece.heads[chosen])
            self._keep(self.readers.system1, self.cache1, asking, choice)
        ready = [(row, place) for row, place in zip(reading + asking, places, strict=True) if not row.done]
        if ready:
            self._propose([row for row, _ in ready], hidden, [place for _, place in ready])

    def _unread(self, trunks: Sequence[Trunk | None], system: int) -> list[Piece]:
        """The trunks among these that a system has not read yet; it is about to."""
        pieces = []
        for trunk in trunks:
            if trunk is not None and system not in trunk.readers:
                trunk.readers.add(system)
                pieces.append(Piece(trunk.slot + (self.offset if system == 2 else 0), 0, trunk.ids))
        return pieces

    def _read(self, system1: list[Piece], system2: list[Piece]) -> torch.Tensor | None:
        """Hidden states of the line; where the systems do not share a forward, of the one that read last."""
        readers, hidden = self.readers, None
        for name, pieces in (("system1", system1), ("system2", system2)):
            readers.counts[f"{name}_forwards"] += bool(pieces)
            readers.counts[f"{name}_tokens"] += sum(len(piece.ids) for piece in pieces)
        if readers.shared and (system1 or system2):
            return readers.system1.read(self.cache1, system1, system2)
        if system1:
            hidden = readers.system1.read(self.cache1, system1)
        if system2:
            hidden = readers.system2.read(self.cache2, system2)
        return hidden

    # Tokens are chosen.

    def _propose(self, rows: list[Row], hidden: torch.Tensor, places: list[int]) -> None:
        """From System 1's hidden states: the next token of each row, or what System 2 is to choose from."""
        for row in rows:
            row.read1 = len(row.own)
        logits = self.readers.system1.logits(hidden[torch.tensor(places, device=hidden.device)])  # (n, V)
        if self.task.process is not None:
            logits = self.task.process([row.prompt for row in rows], [row.new for row in rows], logits)
        if self.guidance is None:
            candidates = draw(logits, self.task.sampling, self._uniforms(rows, logits.device))[:, None]
            valid = torch.ones_like(candidates, dtype=torch.bool)
        else:
            candidates, valid = plausible(logits, self.guidance.alpha, self.guidance.top_k)
        sizes, values = valid.sum(dim=-1).tolist(), logits.gather(-1, candidates).tolist()
        told = logits if self.task.trace else [None] * len(rows)
        for row, tokens, own, size, whole in zip(rows, candidates.tolist(), values, sizes, told, strict=True):
            proposal = Proposal(tokens[:size], own[:size], whole)
            if size > 1 or not (self.guidance is None or self.guidance.lazy):
                row.proposal = proposal
            else:
                self._write(row, proposal, 0)
        self.readers.counts["candidates"] += sum(sizes)

    def _choose(self, rows: list[Row], scores: torch.Tensor) -> list[int]:
        """Which of its candidates each row goes on with; the chosen branch becomes a part of what System 2 has read."""
        proposals, flat = [row.proposal for row in rows], scores.tolist()  # few numbers: no work for a GPU
        sizes = [len(proposal.candidates) for proposal in proposals]
        ends = list(accumulate(sizes))
        own = [flat[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        logits = _rectangle([proposal.values for proposal in proposals])  # (n, K)
        valid = torch.arange(max(sizes), device="cpu") < torch.tensor(sizes, device="cpu")[:, None]
        uniform = self._uniforms(rows, logits.device)
        guided = guided_logits(logits, valid, _rectangle(own), self.guidance.beta)
        choice = draw(guided, self.task.sampling, uniform).tolist()
        alone = choice
        if self.task.trace:
            alone = draw(guided_logits(logits, valid, None, 0.0), self.task.sampling, uniform).tolist()
        for row, proposal, chosen, plain, score in zip(rows, proposals, choice, alone, own, strict=True):
            row.proposal = None
            row.num_verifier_calls += 1
            self._write(row, proposal, chosen, score, chosen != plain)
            row.read2 = len(row.own)
        self._keep(self.readers.system2, self.cache2, rows, choice, self.offset)
        return choice

    def _keep(
        self, reader: Reader, cache: SlotCache, rows: Sequence[Row], choice: Sequence[int], offset: int = 0
    ) -> None:
        """The chosen branch becomes the next column of its row; the others will be written over."""
        columns = [len(row.own) - 1 for row in rows]
        moves = [
            (row.slot + offset, column + chosen, column)
            for row, column, chosen in zip(rows, columns, choice, strict=True)
            if chosen
        ]
        if moves:
            reader.keep(cache, moves)

    def _write(
        self, row: Row, proposal: Proposal, chosen: int, scores: list[float] | None = None, changed: bool = False
    ) -> None:
        """Append a token to its row, and see whether the row ends with it."""
        task, token = self.task, proposal.candidates[chosen]
        row.own.append(token)
        self.readers.counts["tokens"] += 1
        if task.trace:
            logprobs = proposal.logits.log_softmax(dim=-1)[proposal.candidates].tolist()
            kept = proposal.logits if task.keep_logits else None
            row.trace.append(TokenTrace(proposal.candidates, logprobs, scores, chosen, changed, kept))
        if task.on_token is not None:
            task.on_token(row.prompt, row.sample, token)
        written = len(row.own) - row.start
        row.done = token in task.eos or written >= task.max_new_tokens
        if not row.done and task.stop is not None:
            row.done = task.stop(row.prompt, row.sample, row.new)

    def _uniforms(self, rows: list[Row], device: torch.device) -> torch.Tensor | None:
        """A row's random number for its next token, (n,); None for greedy."""
        if self.task.sampling is None:
            return None
        steps = [len(row.own) - row.start for row in rows]
        return uniforms(torch.tensor([row.seed for row in rows], device=device), torch.tensor(steps, device=device))


def _heads(pieces: Sequence[Piece], device: torch.device) -> torch.Tensor:
    """Where the branches of these pieces are in the line, one after the other."""
    return torch.tensor([place for piece in pieces for place in piece.heads], device=device)


def _rectangle(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    """(K,) each -> (n, K) float32, on the CPU."""
    width = max(map(len, rows))
    filled = [[*row, *[0.0] * (width - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.float32, device="cpu")
