"""Models that read tokens of many rows in one flat forward, against keys and values that stay in their slots.

Knows how a forward is laid out (see `attention`) and how System 1, System 2, or both on one set of weights, take part
in it. The models given are neither changed nor copied: each reader holds a frame of its own around the same Parameters.
What is read, and what for, is the business of `generation`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from llm2.attention import IMPLEMENTATION, Block, Feed, Group, Span, Step
from llm2.cache import SlotCache
from llm2.errors import UserError
from llm2.lora import share
from llm2.verifier import ProcessVerifier

PACKED_BYTES = 2**28  # of a vocabulary's weights that are kept a second time, packed: not those of a large model
LONG = 16  # tokens of a piece beyond which it is not padded together with shorter ones


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
    """A decoder-only body."""

    def __init__(self, body: PreTrainedModel) -> None:
        self.body, self.device = framed(body), body.device

    def read(self, cache: SlotCache, pieces: Sequence[Piece]) -> torch.Tensor:
        """Read all tokens of these pieces, of slots that differ; tells each where it begins. -> (N, width)."""
        return self._forward(cache, self._line().extended(pieces))

    def _line(self) -> "Line":
        return (SpanLine if self.device.type == "cpu" else BlockLine)(self.device)

    def _forward(self, cache: SlotCache, line: "Line") -> torch.Tensor:
        cache.reserve(max(line.columns) + 1)
        tensors = torch.tensor([line.ids, line.positions, line.slots, line.columns], device=self.device)  # (4, N)
        output = self.body(
            input_ids=tensors[:1],
            position_ids=tensors[1:2],
            use_cache=False,
            feed=Feed(cache, line.reads, tensors[2], tensors[3]),
        )
        return output.last_hidden_state[0]


class System1Reader(Reader):
    """System 1: hidden states, and of chosen ones the logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model.base_model)
        self.head = head_of(model)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, width) -> (n, V) float32."""
        return self.head(inputs_embeds=hidden[None], use_cache=False).logits[0].float()


class System2Reader(Reader):
    """System 2, a forward of its own."""

    def __init__(self, verifier: ProcessVerifier) -> None:
        super().__init__(verifier.backbone)
        self.head = verifier.score

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, width) -> (n,) float32."""
        return self.head(hidden).squeeze(-1).float()


class SharedReader(System1Reader):
    """Both systems in one forward, where System 2 is a LoRA adapter on System 1's own weights.

    System 2's tokens stand at the end of the line, and the adapter acts on them alone; its rows have their own slots.
    """

    def __init__(self, model: PreTrainedModel, verifier: ProcessVerifier) -> None:
        Reader.__init__(self, verifier.backbone)
        self.head, self.score, self.adapted = head_of(model), verifier.score, Adapted()
        for name, layer in list(self.body.named_modules()):
            if isinstance(layer, LoraLayer):
                self.body.set_submodule(name, AdaptedLinear(layer, self.adapted))

    def read(self, cache: SlotCache, pieces: Sequence[Piece], system2: Sequence[Piece] = ()) -> torch.Tensor:
        """Pieces of System 1's rows, and behind them those of System 2's. -> (N, width)."""
        line = self._line().extended(pieces)
        self.adapted.begin = len(line.ids)
        return self._forward(cache, line.extended(system2))

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, width) -> (n,) float32."""
        return self.score(hidden).squeeze(-1).float()


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
        """(1, N, in) -> (1, N, out)."""
        count = states.shape[1]
        if more := few_sizes(count) - count:
            states = nn.functional.pad(states, (0, 0, 0, more))
        return torch.ops.mkldnn._linear_pointwise(states, self.packed, None, "none", [], "")[:, :count]


def few_sizes(count: int) -> int:
    """The next number of at most four binary digits and zeros behind: at most an eighth more, eight in each octave."""
    step = 1 << max(0, count.bit_length() - 4)
    return -(-count // step) * step


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


class Line:
    """The tokens of a forward, one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.slots: list[int] = []
        self.columns: list[int] = []
        self.reads: list[Span | Step | Block] = []

    def put(self, piece: Piece, count: int) -> slice:
        """Append a piece, filled to `count` tokens; returns where it is."""
        piece.begin, rest = len(self.ids), count - len(piece.ids)
        self.ids += [*piece.ids, *[0] * rest]
        self.positions += [*piece.positions, *[0] * rest]
        self.slots += [piece.slot] * count
        self.columns += range(piece.start, piece.start + count)
        return slice(piece.begin, piece.begin + count)


class SpanLine(Line):
    """Nothing is padded: single tokens of many rows are a Step, all else Spans."""

    def extended(self, pieces: Sequence[Piece]) -> "SpanLine":
        single = [piece for piece in pieces if len(piece.ids) == 1]
        slots = [piece.slot for piece in single]
        # A Step reads all slots from the first to the last, a Span only its own but in a call of its own.
        if len(single) > 1 and 3 * len(single) >= max(slots) + 1 - min(slots):
            pieces = [piece for piece in pieces if len(piece.ids) > 1]
            tokens = [self.put(piece, 1) for piece in single]
            self.reads.append(step_of(single, slice(tokens[0].start, tokens[-1].stop), self.device))
        for piece in pieces:
            self.reads.append(
                Span(self.put(piece, len(piece.ids)), piece.slot, piece.start, piece.branches, piece.trunk)
            )
        return self


class BlockLine(Line):
    """Rectangles, a few for pieces of like length: single tokens, short pieces, long ones."""

    def extended(self, pieces: Sequence[Piece]) -> "BlockLine":
        kinds = ([], [], [])
        for piece in pieces:
            kinds[(len(piece.ids) > 1) + (len(piece.ids) > LONG)].append(piece)
        for own in filter(None, kinds):
            count = max(len(piece.ids) for piece in own)
            tokens = [self.put(piece, count) for piece in own]
            self.reads.append(block_of(own, slice(tokens[0].start, tokens[-1].stop), count, self.device))
        return self


def step_of(single: Sequence[Piece], tokens: slice, device: torch.device) -> Step:
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
        torch.tensor(columns, device=device),
        width=max(columns) + 1,
        rows=None if rows == list(range(len(columns))) else torch.tensor(rows, device=device),
        groups=[
            Group(
                slot,
                torch.tensor([piece.slot - slots.start for piece in own], device=device),
                torch.tensor([piece.trunk[1] for piece in own], device=device),
                max(piece.trunk[1] for piece in own),
            )
            for slot, own in groups.items()
        ],
    )


def block_of(pieces: Sequence[Piece], tokens: slice, count: int, device: torch.device) -> Block:
    """Pieces of at most `count` tokens; what only fills the rectangle goes to the columns behind."""
    slots = [piece.slot for piece in pieces]
    together = slots == list(range(slots[0], slots[0] + len(slots)))
    own = [list(range(piece.start, piece.start + count)) for piece in pieces]
    bound = [[*piece.positions, *[0] * (count - len(piece.ids))] for piece in pieces]
    return Block(
        tokens,
        slice(slots[0], slots[-1] + 1) if together else torch.tensor(slots, device=device),
        torch.tensor(own, device=device),
        torch.tensor(bound, device=device),
        width=max(piece.start for piece in pieces) + count,
    )
