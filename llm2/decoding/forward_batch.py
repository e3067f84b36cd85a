"""The flat batch of one forward: chunks of many sequences, one behind the other, and how attention reads them.

On a CPU nothing is padded (`VarlenBatch`). On a GPU chunks of similar length form padded rectangles (`PaddedBatch`).
For CUDA graphs the sizes of those with short chunks are rounded up to a few, and longer chunks, such as prompts, are
read in forwards of their own (`split`).
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from llm2.decoding.attention import DecodeRead, PaddedRead, PrefillRead, PrefixGroup
from llm2.decoding.cuda_graphs import bucket
from llm2.decoding.kv_cache import SlotCache

LONG_CHUNK = 16  # longer chunks are not padded together with shorter ones
MAX_GRAPH_CHUNK = 64  # forwards with longer chunks are not captured
MAX_BATCHED_TOKENS = 8_192  # tokens of a forward without padding, give or take a chunk: bounds its memory
WIDTH_STEP = 64  # bucketed widths are multiples of this
WIDTH_STEPS = 2  # bucket sizes for widths, between powers of two


@dataclass(eq=False)
class Chunk:
    """Consecutive tokens of one sequence in a forward."""

    slot: int
    start: int  # cache position of the first token
    ids: Sequence[int]
    branches: int = 0  # number of trailing candidates: each sees everything before them and itself
    prefix: tuple[int, int] | None = None  # slot and length of a shared prefix
    offset: int = 0  # of the first token in the batch, set when it is added to one

    @property
    def last(self) -> int:
        """Index of the last token in the batch."""
        return self.offset + len(self.ids) - 1

    @property
    def branch_indices(self) -> range:
        """Indices of the branches in the batch."""
        return range(self.last + 1 - self.branches, self.last + 1)

    @property
    def position_ids(self) -> list[int]:
        first = self.start + (0 if self.prefix is None else self.prefix[1])
        behind = first + len(self.ids) - self.branches
        return [*range(first, behind), *[behind] * self.branches]


class ForwardBatch:
    """The tokens of one forward."""

    graph_key: Hashable = None  # equal for forwards that one CUDA graph can run; None: not to be captured

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.position_ids: list[int] = []
        self.slots: list[int] = []
        self.kv_positions: list[int] = []
        self.verifier_start = 0  # index of the verifier's first token, where both systems share a forward

    @property
    def indices(self) -> list[list[int]]:
        """(4, N)."""
        return [self.ids, self.position_ids, self.slots, self.kv_positions]

    @property
    def capacity(self) -> int:
        """Positions that the cache must have."""
        return max(self.kv_positions) + 1

    def _append(self, chunk: Chunk) -> slice:
        """Returns the chunk's tokens in the batch."""
        chunk.offset = len(self.ids)
        self.ids += chunk.ids
        self.position_ids += chunk.position_ids
        self.slots += [chunk.slot] * len(chunk.ids)
        self.kv_positions += range(chunk.start, chunk.start + len(chunk.ids))
        return slice(chunk.offset, len(self.ids))


class VarlenBatch(ForwardBatch):
    """Without padding: the single tokens become a DecodeRead, everything else PrefillReads."""

    def __init__(self) -> None:
        super().__init__()
        self._reads: list[PrefillRead | DecodeRead] = []

    def add(self, chunks: Sequence[Chunk]) -> None:
        """Append chunks of distinct slots; sets each chunk's offset."""
        single = [chunk for chunk in chunks if len(chunk.ids) == 1]
        slots = [chunk.slot for chunk in single]
        # A DecodeRead reads all slots from the first to the last; a PrefillRead only its own, but in one call per slot.
        if len(single) > 1 and 3 * len(single) >= max(slots) + 1 - min(slots):
            chunks = [chunk for chunk in chunks if len(chunk.ids) > 1]
            tokens = [self._append(chunk) for chunk in single]
            self._reads.append(_decode_read(single, slice(tokens[0].start, tokens[-1].stop)))
        for chunk in chunks:
            self._reads.append(PrefillRead(self._append(chunk), chunk.slot, chunk.start, chunk.branches, chunk.prefix))

    def reads(self, indices: torch.Tensor) -> list[PrefillRead | DecodeRead]:
        return self._reads


class PaddedGroup(NamedTuple):
    """The size of one rectangle of a PaddedBatch."""

    rows: int
    length: int  # tokens of each row
    first_slot: int | None  # the rows are the slots from here on; None: any slots, given with the tokens


class PaddedBatch(ForwardBatch):
    """Padded rectangles: one each for single tokens, short chunks, and longer ones of similar length.

    Padding is written to the cache's last position, which no real token sees; it sees the first position only.

    Args:
        few_shapes: round sizes up, so that a decoding needs few CUDA graphs.
    """

    def __init__(self, cache: SlotCache, few_shapes: bool) -> None:
        super().__init__()
        self.cache, self.few_shapes = cache, few_shapes
        self.groups: list[PaddedGroup] = []

    @property
    def width(self) -> int:
        """Cache positions that are read."""
        width = max(self.kv_positions) + 1
        return padded_width(width) if self.few_shapes else width

    @property
    def capacity(self) -> int:
        return self.width + 1  # the last position is for padding

    @property
    def graph_key(self) -> Hashable:
        return (tuple(self.groups), self.width, self.verifier_start) if self.few_shapes else None

    def add(self, chunks: Sequence[Chunk]) -> None:
        """Append chunks of distinct slots; sets each chunk's offset."""
        by_length = defaultdict(list)
        for chunk in chunks:
            length = len(chunk.ids)
            similar = LONG_CHUNK if 1 < length <= LONG_CHUNK else bucket(length, 1 if self.few_shapes else 2)
            by_length[similar].append(chunk)
        for _, similar in sorted(by_length.items()):
            self._add_group(similar)

    def reads(self, indices: torch.Tensor) -> list[PaddedRead]:
        """The reads of `indices` (4, N); besides these they depend on the graph key alone."""
        _, position_ids, slots, kv_positions = indices
        reads, start, width = [], 0, self.width
        for rows, length, first_slot in self.groups:
            tokens = slice(start, start + rows * length)
            kv_index, prefix_len = (tensor[tokens].view(rows, length) for tensor in (kv_positions, position_ids))
            if first_slot is None:
                row_slots = slots[tokens].view(rows, length)[:, 0]
            else:
                row_slots = slice(first_slot, first_slot + rows)
            reads.append(PaddedRead(tokens, row_slots, kv_index, prefix_len, width))
            start = tokens.stop
        return reads

    def _add_group(self, chunks: Sequence[Chunk]) -> None:
        """Append chunks as one rectangle, over neighbouring slots in place where theirs lie close enough."""
        chunks = sorted(chunks, key=lambda chunk: chunk.slot)
        length, first = max(len(chunk.ids) for chunk in chunks), self.cache.group_start(chunks[0].slot)
        span = chunks[-1].slot + 1 - first
        in_place = span == len(chunks) or (length == 1 and span <= 2 * len(chunks))
        rows = span if in_place else len(chunks)
        if self.few_shapes:
            length, rows = bucket(length, 1), bucket(rows, 1)
        if in_place:
            rows = min(rows, self.cache.num_slots - first)
            by_slot = {chunk.slot: chunk for chunk in chunks}
            filled = [(slot, by_slot.get(slot)) for slot in range(first, first + rows)]
        else:  # attention copies the keys and values of these slots together
            filled = [(chunk.slot, chunk) for chunk in chunks] + [(first, None)] * (rows - len(chunks))
        for slot, chunk in filled:
            padding = length
            if chunk is not None:
                self._append(chunk)
                padding -= len(chunk.ids)
            self.ids += [0] * padding
            self.position_ids += [1] * padding
            self.slots += [slot] * padding
            self.kv_positions += [-1] * padding
        self.groups.append(PaddedGroup(rows, length, first if in_place else None))


def padded_width(width: int) -> int:
    """One of the few widths that a captured forward reads."""
    return WIDTH_STEP * bucket(-(-width // WIDTH_STEP), WIDTH_STEPS)


def split(
    chunks: Sequence[Chunk], verifier_chunks: Sequence[Chunk], few_shapes: bool
) -> list[tuple[list[Chunk], list[Chunk]]]:
    """The chunks of each padded forward, about MAX_BATCHED_TOKENS at most.

    Args:
        few_shapes: keep short chunks, middle ones and those that no graph is captured for apart.
    """
    parts, tokens = defaultdict(lambda: ([], [])), Counter()
    for system, of_system in enumerate((chunks, verifier_chunks)):
        for chunk in sorted(of_system, key=lambda chunk: len(chunk.ids)):
            length = len(chunk.ids)
            kind = few_shapes * ((length > LONG_CHUNK) + (length > MAX_GRAPH_CHUNK))
            tokens[kind] += length
            parts[kind, (tokens[kind] - 1) // MAX_BATCHED_TOKENS][system].append(chunk)
    return [part for _, part in sorted(parts.items())]


def _decode_read(single: Sequence[Chunk], tokens: slice) -> DecodeRead:
    """Chunks of one token each in one read."""
    slots = slice(min(chunk.slot for chunk in single), max(chunk.slot for chunk in single) + 1)
    positions = [0] * (slots.stop - slots.start)
    by_prefix: dict[int, list[Chunk]] = {}
    for chunk in single:
        positions[chunk.slot - slots.start] = chunk.start
        if chunk.prefix is not None:
            by_prefix.setdefault(chunk.prefix[0], []).append(chunk)
    rows = [chunk.slot - slots.start for chunk in single]
    groups, grouped = [], []
    for slot, chunks in by_prefix.items():
        members = slice(len(grouped), len(grouped) + len(chunks))
        grouped += [chunk.slot - slots.start for chunk in chunks]
        lengths, starts = ([chunk.prefix[1] for chunk in chunks], [chunk.start for chunk in chunks])
        groups.append(PrefixGroup(slot, members, torch.tensor(lengths), torch.tensor(starts)))
    return DecodeRead(
        tokens,
        slots,
        torch.tensor(positions),
        width=max(positions) + 1,
        rows=None if rows == list(range(len(positions))) else torch.tensor(rows),
        grouped=torch.tensor(grouped) if groups else None,
        groups=groups,
    )
