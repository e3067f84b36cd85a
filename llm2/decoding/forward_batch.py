"""How the tokens of a forward are laid out: one line of pieces of many rows, and what attention makes of it.

On a CPU nothing is padded (`SpanLine`); on a GPU pieces of like length form rectangles, whose shapes can be rounded up
to a few (`BlockLine`), so that a forward can be recorded. Knows nothing of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from llm2.decoding.attention import Block, Group, Span, Step
from llm2.decoding.cuda_graphs import rounded
from llm2.decoding.kv_cache import SlotCache

LONG = 16  # tokens of a piece beyond which it is not padded together with shorter ones
SHORT = 64  # tokens of the longest piece of a recorded forward
WIDTH = 64  # its width is a multiple of this
ROWS = 2  # numbers of rows to which its rectangles are rounded up, between powers of two


@dataclass(eq=False)
class Piece:
    """Consecutive columns of one row in a forward."""

    slot: int
    start: int  # column of the first token
    ids: Sequence[int]
    branches: int = 0  # so many tokens at the end see what stands before them all and themselves
    trunk: tuple[int, int] | None = None  # slot, and how many of its columns stand before the row's own
    begin: int = 0  # where `read` put the first token in the line

    @property
    def last(self) -> int:
        return self.begin + len(self.ids) - 1

    @property
    def heads(self) -> range:
        """Where the branches are in the line."""
        return range(self.last + 1 - self.branches, self.last + 1)

    @property
    def positions(self) -> list[int]:
        first = self.start + (0 if self.trunk is None else self.trunk[1])
        trunk = range(first, first + len(self.ids) - self.branches)
        return [*trunk, *[first + len(trunk)] * self.branches]


@dataclass(frozen=True, eq=False)
class Spans:
    """How a SpanLine is read: no two forwards alike."""

    parts: Sequence[Span | Step]
    columns: int  # that the cache must have
    begin: int  # from which token on System 2 reads, where both systems read in one line
    short = False  # whether a recording may be made of it

    def reads(self, numbers: torch.Tensor) -> Sequence[Span | Step]:
        return self.parts


class Rectangle(NamedTuple):
    rows: int
    count: int  # tokens of each
    slot: int | None  # of the first row, the others' slots behind it; None: each row says which


class Blocks(NamedTuple):
    """How a BlockLine is read, but for the numbers: equal for forwards of one shape."""

    rectangles: tuple[Rectangle, ...]
    width: int  # columns that are read
    begin: int  # as in `Spans`

    @property
    def columns(self) -> int:
        return self.width + 1  # the last one takes what only fills a rectangle

    @property
    def short(self) -> bool:
        return all(rectangle.count <= SHORT for rectangle in self.rectangles)

    def reads(self, numbers: torch.Tensor) -> list[Block]:
        """Of a line's ids, positions, slots, columns (4, N)."""
        _, positions, slots, columns = numbers
        blocks, begin = [], 0
        for rows, count, slot in self.rectangles:
            tokens = slice(begin, begin + rows * count)
            bound, own, begin = positions[tokens].view(rows, count), columns[tokens].view(rows, count), tokens.stop
            where = slots[tokens].view(rows, count)[:, 0] if slot is None else slice(slot, slot + rows)
            blocks.append(Block(tokens, where, own, bound, self.width))
        return blocks


class Line:
    """The tokens of a forward, one after the other."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.slots: list[int] = []
        self.columns: list[int] = []
        self.begin = 0

    @property
    def numbers(self) -> list[list[int]]:
        return [self.ids, self.positions, self.slots, self.columns]

    def put(self, piece: Piece) -> slice:
        """Append a piece; returns where it is."""
        piece.begin = len(self.ids)
        self.ids += piece.ids
        self.positions += piece.positions
        self.slots += [piece.slot] * len(piece.ids)
        self.columns += range(piece.start, piece.start + len(piece.ids))
        return slice(piece.begin, len(self.ids))


class SpanLine(Line):
    """Nothing is padded: single tokens of many rows are a Step, all else Spans."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[Span | Step] = []

    def extended(self, pieces: Sequence[Piece]) -> "SpanLine":
        single = [piece for piece in pieces if len(piece.ids) == 1]
        slots = [piece.slot for piece in single]
        # A Step reads all slots from the first to the last, a Span only its own but in a call of its own.
        if len(single) > 1 and 3 * len(single) >= max(slots) + 1 - min(slots):
            pieces = [piece for piece in pieces if len(piece.ids) > 1]
            tokens = [self.put(piece) for piece in single]
            self.parts.append(step_of(single, slice(tokens[0].start, tokens[-1].stop)))
        for piece in pieces:
            self.parts.append(Span(self.put(piece), piece.slot, piece.start, piece.branches, piece.trunk))
        return self

    def layout(self) -> Spans:
        return Spans(self.parts, max(self.columns) + 1, self.begin)


class BlockLine(Line):
    """Rectangles, a few for pieces of like length: single tokens, short pieces, longer ones.

    What only fills a rectangle is written to the cache's last column, which no token sees; it sees the first column.

    Args:
        few_shapes: round sizes up, so that the forwards of a decoding have few shapes between them.
    """

    def __init__(self, cache: SlotCache, few_shapes: bool) -> None:
        super().__init__()
        self.cache, self.few_shapes = cache, few_shapes
        self.rectangles: list[Rectangle] = []

    def extended(self, pieces: Sequence[Piece]) -> "BlockLine":
        kinds = ([], [], [])
        for piece in pieces:
            kinds[(len(piece.ids) > 1) + (len(piece.ids) > LONG)].append(piece)
        for own in filter(None, kinds):
            self._put_together(own)
        return self

    def layout(self) -> Blocks:
        width = max(self.columns) + 1
        if self.few_shapes:
            width = WIDTH * rounded(-(-width // WIDTH), 4)
        return Blocks(tuple(self.rectangles), width, self.begin)

    def _put_together(self, pieces: Sequence[Piece]) -> None:
        """Append pieces as a rectangle: in place, if their slots lie close enough, from a system's first one on."""
        pieces = sorted(pieces, key=lambda piece: piece.slot)
        count, first = max(len(piece.ids) for piece in pieces), self.cache.first_of(pieces[0].slot)
        span = pieces[-1].slot + 1 - first
        close = span == len(pieces) or (count == 1 and span <= 2 * len(pieces))
        rows = span if close else len(pieces)
        if self.few_shapes:
            count, rows = rounded(count, 1), rounded(rows, ROWS)
        if close:
            rows = min(rows, self.cache.slots - first)
            of_slot = {piece.slot: piece for piece in pieces}
            filled = [(slot, of_slot.get(slot)) for slot in range(first, first + rows)]
        else:  # the keys and values of these rows are copied together
            filled = [(piece.slot, piece) for piece in pieces] + [(first, None)] * (rows - len(pieces))
        for slot, piece in filled:
            self._put_row(slot, piece, count)
        self.rectangles.append(Rectangle(rows, count, first if close else None))

    def _put_row(self, slot: int, piece: Piece | None, count: int) -> None:
        if piece is not None:
            self.put(piece)
            count -= len(piece.ids)
        self.ids += [0] * count
        self.positions += [1] * count
        self.slots += [slot] * count
        self.columns += [-1] * count


def step_of(single: Sequence[Piece], tokens: slice) -> Step:
    """Pieces of one token each, read at once."""
    slots = slice(min(piece.slot for piece in single), max(piece.slot for piece in single) + 1)
    columns = [0] * (slots.stop - slots.start)
    groups: dict[int, list[Piece]] = {}
    for piece in single:
        columns[piece.slot - slots.start] = piece.start
        if piece.trunk is not None:
            groups.setdefault(piece.trunk[0], []).append(piece)
    rows = [piece.slot - slots.start for piece in single]
    return Step(
        tokens,
        slots,
        torch.tensor(columns),
        width=max(columns) + 1,
        rows=None if rows == list(range(len(columns))) else torch.tensor(rows),
        groups=[
            Group(
                slot,
                torch.tensor([piece.slot - slots.start for piece in own]),
                torch.tensor([piece.trunk[1] for piece in own]),
                max(piece.trunk[1] for piece in own),
            )
            for slot, own in groups.items()
        ],
    )
