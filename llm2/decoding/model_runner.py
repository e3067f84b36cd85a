"""Models that read tokens of many rows in one flat forward, against keys and values that stay in their slots.

Knows how System 1, System 2, or both on one set of weights take part in a forward; `lines` lays it out. The models
given are neither changed nor copied: each reader holds a frame of its own around the same Parameters. What is read, and
what for, is the business of `generation`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from llm2.decoding.attention import IMPLEMENTATION, Feed
from llm2.decoding.cuda_graphs import Recorder, rounded
from llm2.decoding.forward_batch import ROWS, BlockLine, Blocks, Line, Piece, SpanLine, Spans
from llm2.decoding.kv_cache import SlotCache
from llm2.errors import UserError
from llm2.verifier.lora import clone_sharing_weights
from llm2.verifier.model import ProcessVerifier

PACKED_BYTES = 2**28  # of a vocabulary's weights that are kept a second time, packed: not those of a large model


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

    def _line(self, cache: SlotCache) -> Line:
        if self.recorder is None and self.device.type == "cpu":
            return SpanLine()
        return BlockLine(cache, few_shapes=self.recorder is not None)

    def _forward(self, cache: SlotCache, line: Line) -> torch.Tensor:
        layout = line.layout()
        cache.reserve(layout.columns)
        numbers = torch.tensor(line.numbers, device=self.device)  # (4, N)
        run = partial(self._run, cache, layout)
        if self.recorder is None or not layout.short:
            return run(numbers)
        self.recorder.rest_on((cache, cache.columns))
        return self.recorder(layout, run, numbers)

    def _run(self, cache: SlotCache, layout: Spans | Blocks, numbers: torch.Tensor) -> torch.Tensor:
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

    def _run(self, cache: SlotCache, layout: Spans | Blocks, numbers: torch.Tensor) -> torch.Tensor:
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
        """(1, N, in) -> (1, N, out)."""
        count = states.shape[1]
        if more := rounded(count, 8) - count:  # oneDNN keeps a kernel for every number of tokens that it meets
            states = nn.functional.pad(states, (0, 0, 0, more))
        return torch.ops.mkldnn._linear_pointwise(states, self.packed, None, "none", [], "")[:, :count]


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
    frame = clone_sharing_weights(body)
    frame.set_attn_implementation(IMPLEMENTATION)
    return frame.eval()


def head_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model with everything but its body: from hidden states to logits, soft caps and scales included."""
    linear, instead = model.get_output_embeddings(), {model.base_model: _Given()}
    plain = linear.weight.device.type == "cpu" and linear.weight.dtype == torch.float32 and linear.bias is None
    if plain and linear.weight.nbytes <= PACKED_BYTES:
        instead[linear] = PackedLinear(linear.weight)
    return clone_sharing_weights(model, instead).eval()


def _moved(cache: SlotCache, numbers: torch.Tensor) -> torch.Tensor:
    """Moves (3, n), as a function of one tensor."""
    cache.move_columns(*numbers)
    return numbers
