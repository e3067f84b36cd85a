"""Models that read tokens of many rows in one flat forward, against keys and values that stay in their slots.

Knows how a forward is laid out (see `attention`) and how System 1, System 2, or both on one set of weights, take part
in it. The models given are neither changed nor copied: each reader holds a frame of its own around the same Parameters.
What is read, and what for, is the business of `generation`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from llm2.attention import IMPLEMENTATION, Block, Feed, Group, Span, Step
from llm2.cache import SlotCache
from llm2.errors import UserError
from llm2.graphs import Recorder, rounded
from llm2.lora import share
from llm2.verifier import ProcessVerifier

PACKED_BYTES = 2**28  # of a vocabulary's weights that are kept a second time, packed: not those of a large model
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


class Reader:
    """A decoder-only body.

    Args:
        recorder: with it, forwards are laid out in few shapes, and those of short pieces replayed.
    """

    def __init__(self, body: PreTrainedModel, recorder: Recorder | None = None) -> None:
        self.body, self.device, self.recorder = framed(body), body.device, recorder

    def read(self, cache: SlotCache, pieces: Sequence[Piece]) -> torch.Tensor:
        """Read all tokens of these pieces, of slots that differ; tells each where it begins. -> (N, width)."""
        return self._forward(cache, self._line(cache).extended(pieces))

    def keep(self, cache: SlotCache, moves: Sequence[tuple[int, int, int]]) -> None:
        """Copy columns of slots: each move is a slot, the column that is copied, and the one that it becomes."""
        if self.recorder is None:
            cache.move_columns(*torch.tensor(moves, device=self.device).T)
            return
        spare = rounded(len(moves), ROWS) - len(moves)
        numbers = torch.tensor([*moves, *[(0, -1, -1)] * spare], device=self.device).T.contiguous()
        self.recorder.rest_on((cache, cache.columns))
        self.recorder(("keep", numbers.shape[1]), partial(_moved, cache), numbers)

    def _line(self, cache: SlotCache) -> "Line":
        if self.recorder is None and self.device.type == "cpu":
            return SpanLine()
        return BlockLine(cache, few_shapes=self.recorder is not None)

    def _forward(self, cache: SlotCache, line: "Line") -> torch.Tensor:
        layout = line.layout()
        cache.reserve(layout.columns)
        numbers = torch.tensor(line.numbers, device=self.device)  # (4, N)
        run = partial(self._run, cache, layout)
        if self.recorder is None or not layout.short:
            return run(numbers)
        self.recorder.rest_on((cache, cache.columns))
        return self.recorder(layout, run, numbers)

    def _run(self, cache: SlotCache, layout: "Spans | Blocks", numbers: torch.Tensor) -> torch.Tensor:
        ids, positions, slots, columns = numbers
        output = self.body(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            feed=Feed(cache, layout.reads(numbers), slots, columns),
        )
        return output.last_hidden_state[0]


class System1Reader(Reader):
    """System 1: hidden states, and of chosen ones the logits."""

    def __init__(self, model: PreTrainedModel, recorder: Recorder | None = None) -> None:
        super().__init__(model.base_model, recorder)
        self.head = head_of(model)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, width) -> (n, V) float32."""
        return self.head(inputs_embeds=hidden[None], use_cache=False).logits[0].float()


class System2Reader(Reader):
    """System 2, a forward of its own."""

    def __init__(self, verifier: ProcessVerifier, recorder: Recorder | None = None) -> None:
        super().__init__(verifier.backbone, recorder)
        self.score = verifier.score

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, width) -> (n,) float32."""
        return self.score(hidden).squeeze(-1).float()


class SharedReader(System1Reader, System2Reader):
    """Both systems in one forward, where System 2 is a LoRA adapter on System 1's own weights.

    System 2's tokens stand at the end of the line, and the adapter acts on them alone; its rows have their own slots.
    """

    def __init__(self, model: PreTrainedModel, verifier: ProcessVerifier, recorder: Recorder | None = None) -> None:
        Reader.__init__(self, verifier.backbone, recorder)
        self.head, self.score, self.adapted = head_of(model), verifier.score, Adapted()
        for name, layer in list(self.body.named_modules()):
            if isinstance(layer, LoraLayer):
                self.body.set_submodule(name, AdaptedLinear(layer, self.adapted))

    def read(self, cache: SlotCache, pieces: Sequence[Piece], system2: Sequence[Piece] = ()) -> torch.Tensor:
        """Pieces of System 1's rows, and behind them those of System 2's. -> (N, width)."""
        line = self._line(cache).extended(pieces)
        line.begin = len(line.ids)
        return self._forward(cache, line.extended(system2))

    def _run(self, cache: SlotCache, layout: "Spans | Blocks", numbers: torch.Tensor) -> torch.Tensor:
        self.adapted.begin = layout.begin
        return super()._run(cache, layout, numbers)


@dataclass(eq=False)
class Adapted:
    """From which token of the line on the adapter acts; all layers share one."""

    begin: int = 0


class AdaptedLinear(nn.Module):
    """A linear layer of System 1 whose adapter acts on the last tokens of the line only."""

    def __init__(self, layer: LoraLayer, adapted: Adapted) -> None:
        super().__init__()
        (name,) = layer.active_adapters
        self.base, self.adapted = layer.get_base_layer(), adapted
        self.down = layer.lora_A[name].weight.detach()  # (rank, in)
        self.up = (layer.lora_B[name].weight.detach() * layer.scaling[name]).T.contiguous()  # (rank, out)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(1, N, in) -> (1, N, out)."""
        output, begin = self.base(states), self.adapted.begin
        if begin < states.shape[1]:
            output[0, begin:].addmm_(states[0, begin:] @ self.down.T, self.up)
        return output


class PackedLinear(nn.Module):
    """A float32 linear layer on a CPU whose weight oneDNN keeps in the order in which it reads it.

    For a few rows and a vocabulary of outputs this takes half the time of `nn.Linear`, which sorts the weight anew at
    each call. The operators are those that torch.compile uses on a CPU.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(states, self.packed, None, "none", [], "")


class _Given(nn.Module):
    """In the place of a body: hands on the hidden states that it is given."""

    def forward(self, *unused, inputs_embeds: torch.Tensor, **options) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


def framed(body: PreTrainedModel) -> PreTrainedModel:
    """The same Parameters in modules of our own, set to `attention.attend`."""
    if not body._supports_attention_backend:
        raise UserError(
            f"{type(body).__name__} does not take attention functions from outside (transformers' "
            "`_supports_attention_backend`), which decoding from slots needs; use another backbone"
        )
    frame = share(body)
    frame.set_attn_implementation(IMPLEMENTATION)
    return frame.eval()


def head_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model with everything but its body: from hidden states to logits, soft caps and scales included."""
    linear, instead = model.get_output_embeddings(), {model.base_model: _Given()}
    plain = linear.weight.device.type == "cpu" and linear.weight.dtype == torch.float32 and linear.bias is None
    if plain and linear.weight.nbytes <= PACKED_BYTES:
        instead[linear] = PackedLinear(linear.weight)
    return share(model, instead).eval()


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


def _moved(cache: SlotCache, numbers: torch.Tensor) -> torch.Tensor:
    """Moves (3, n), as a function of one tensor."""
    cache.move_columns(*numbers)
    return numbers


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
