"""Forwards of System 1, of the verifier, or of both on one set of weights, over flat batches and slot caches.

The given models are neither changed nor copied: a runner wraps the same Parameters in modules of its own.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from llm2.common.architecture import refuse_undecodable
from llm2.decoding.attention import IMPLEMENTATION, AttentionMetadata
from llm2.decoding.cuda_graphs import CUDAGraphs, bucket
from llm2.decoding.forward_batch import MAX_GRAPH_CHUNK, Chunk, PaddedBatch, VarlenBatch, padded_width, split
from llm2.decoding.kv_cache import SlotCache
from llm2.decoding.linear import OneDNNLinear, Snapshot, use_float16_weights, use_onednn
from llm2.verifier.lora import clone_sharing_weights
from llm2.verifier.model import ProcessVerifier

# Not cuDNN's, which torch prefers on Hopper: it plans anew for each new shape, and ours change with every token.
KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
MAX_ONEDNN_BYTES = 2**28  # larger vocabulary heads are not kept a second time in oneDNN's layout
MAX_COPIED_BYTES = 2**32  # of a body in bfloat16: those of up to two billion parameters are kept a second time too


class ModelRunner:
    """A decoder-only model without its head.

    Args:
        graphs: lay forwards out in few shapes and replay those of short chunks; None runs every forward eagerly.
        float16_weights: linear layers read float16 copies of their weights (`linear.py`).

    Attributes:
        head: what turns hidden states into logits; None without a vocabulary.
        counts: `forwards`, `replayed` ones, and `tokens` of them all, padding included.
    """

    head: PreTrainedModel | None = None

    def __init__(self, body: PreTrainedModel, graphs: CUDAGraphs | None = None, float16_weights: bool = False) -> None:
        self.body, self.device, self.graphs = with_slot_attention(body), body.device, graphs
        if float16_weights:
            use_float16_weights(self.body)
        else:
            use_onednn(self.body, torch.bfloat16, MAX_COPIED_BYTES)  # in float32 a body gains nothing on many tokens
        self.counts: Counter[str] = Counter()

    @property
    def unpadded(self) -> bool:
        """Whether batches have no padding; only those can read a shared prefix in place."""
        return self.graphs is None and self.device.type == "cpu"

    def forward(self, cache: SlotCache, chunks: Sequence[Chunk], verifier_chunks: Sequence[Chunk] = ()) -> torch.Tensor:
        """Read chunks of distinct slots; sets each chunk's offset. -> hidden states (N, width).

        One forward, or several to save padding, bound memory or reuse shapes (`split`).

        Args:
            verifier_chunks: with a SharedRunner, the chunks that the verifier's adapter acts on.
        """
        if self.unpadded:
            return self._forward(cache, VarlenBatch(), chunks, verifier_chunks)
        hidden, offset = [], 0
        for part in split(chunks, verifier_chunks, self.graphs is not None):
            both = [*part[0], *part[1]]
            few_shapes = self.graphs is not None and max(len(chunk.ids) for chunk in both) <= MAX_GRAPH_CHUNK
            hidden.append(self._forward(cache, PaddedBatch(cache, few_shapes), *part))
            for chunk in both:
                chunk.offset += offset
            offset += len(hidden[-1])
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)

    def record(self, cache: SlotCache, rows: int) -> None:
        """Capture steps of one token each for up to `rows` sequences, in all their shapes, before the cache is used."""
        if self.graphs is None or self.graphs.knows(cache):
            return
        widths = {padded_width(position + 1) for position in range(cache.capacity)}
        for width in sorted(width for width in widths if width < cache.capacity):
            for count in (min(2**power, rows) for power in range(rows.bit_length() + 1)):
                chunks = [Chunk(slot, width - 1, [0]) for slot in range(count)]
                for _ in range(2):
                    self.forward(cache, chunks)

    def _forward(
        self,
        cache: SlotCache,
        batch: VarlenBatch | PaddedBatch,
        chunks: Sequence[Chunk],
        verifier_chunks: Sequence[Chunk],
    ) -> torch.Tensor:
        batch.add(chunks)
        batch.verifier_start = len(batch.ids)
        batch.add(verifier_chunks)
        cache.reserve(batch.capacity)
        self.counts.update(forwards=1, tokens=len(batch.ids))
        run, indices = partial(self._run, cache, batch), torch.tensor(batch.indices, device=self.device)  # (4, N)
        if batch.graph_key is None:
            return run(indices)
        replays = self.graphs.replays
        hidden = self.graphs(cache, batch.graph_key, run, indices)
        self.counts["replayed"] += self.graphs.replays - replays
        return hidden

    def snapshots(self) -> Iterator[Snapshot]:
        """Of the weights that the runner holds copies of."""
        for module in (self.body, self.head):
            for layer in () if module is None else module.modules():
                yield from getattr(layer, "copied", ())

    def commit(self, cache: SlotCache, moves: Sequence[tuple[int, int, int]]) -> None:
        """Move chosen branches: each move is (slot, source position, target position)."""
        if self.graphs is None:
            cache.move_positions(*torch.tensor(moves, device=self.device).T)
            return
        padding = bucket(len(moves), 1) - len(moves)
        indices = torch.tensor([*moves, *[(0, -1, -1)] * padding], device=self.device).T.contiguous()  # (3, n)
        self.graphs(cache, ("commit", indices.shape[1]), partial(_move_positions, cache), indices)

    def _run(self, cache: SlotCache, batch: VarlenBatch | PaddedBatch, indices: torch.Tensor) -> torch.Tensor:
        ids, position_ids, slots, kv_positions = indices
        with attention_kernels(self.device):
            output = self.body(
                input_ids=ids[None],
                position_ids=position_ids[None],
                use_cache=False,
                attention_metadata=AttentionMetadata(cache, batch.reads(indices), slots, kv_positions),
            )
        return output.last_hidden_state[0]


def attention_kernels(device: torch.device) -> AbstractContextManager:
    """`KERNELS` on a GPU. Of the whole process, so elsewhere, where threads may decode, it is left alone."""
    return sdpa_kernel(KERNELS) if device.type == "cuda" else nullcontext()


class LMRunner(ModelRunner):
    """System 1."""

    def __init__(self, model: PreTrainedModel, graphs: CUDAGraphs | None = None, float16_weights: bool = False) -> None:
        super().__init__(model.base_model, graphs, float16_weights)
        self.head = head_of(model, float16_weights)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, width) -> (n, V) float32."""
        return self.head(inputs_embeds=hidden[None], use_cache=False).logits[0].float()


class VerifierRunner(ModelRunner):
    """The verifier in forwards of its own."""

    def __init__(
        self, verifier: ProcessVerifier, graphs: CUDAGraphs | None = None, float16_weights: bool = False
    ) -> None:
        super().__init__(verifier.backbone, graphs, float16_weights)
        self.use_head(verifier)

    def use_head(self, verifier: ProcessVerifier) -> None:
        self.score, self.scores_behind = verifier.score, verifier.prefix_scores
        self.reads_candidates = verifier.config.reads_candidates

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of tokens that were read, (n, width) -> (n,) float32."""
        return nn.functional.linear(hidden.float(), self.score.weight.float()).squeeze(-1)

    def prefix_scores(self, states: torch.Tensor, tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Of tokens (n, K) behind prefixes with these states (n, D); logits are System 1's -> (n, K) float32."""
        return self.scores_behind(states, tokens)


class SharedRunner(LMRunner, VerifierRunner):
    """Both systems in one forward, for a verifier that is a LoRA adapter on System 1's weights.

    The verifier's tokens stand at the end of the batch, in slots of their own, and the adapter acts on them alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        verifier: ProcessVerifier,
        graphs: CUDAGraphs | None = None,
        float16_weights: bool = False,
    ) -> None:
        ModelRunner.__init__(self, verifier.backbone, graphs, float16_weights)
        self.use_head(verifier)
        self.head, self.adapter = head_of(model, float16_weights), PartialLoRA()
        for name, layer in list(self.body.named_modules()):
            if isinstance(layer, LoraLayer):
                self.body.set_submodule(name, PartialLoRALinear(layer, self.adapter))

    def _run(self, cache: SlotCache, batch: VarlenBatch | PaddedBatch, indices: torch.Tensor) -> torch.Tensor:
        self.adapter.start = batch.verifier_start
        return super()._run(cache, batch, indices)


class PartialLoRA(threading.local):
    """State that all layers of an adapter share, each thread's its own."""

    start: int = 0  # index of the first token of the batch that the adapter acts on


class PartialLoRALinear(nn.Module):
    """A linear layer of System 1 whose adapter acts on the last tokens of the batch only."""

    def __init__(self, layer: LoraLayer, adapter: PartialLoRA) -> None:
        super().__init__()
        (name,) = layer.active_adapters
        self.base, self.adapter = layer.get_base_layer(), adapter
        dtype = self.base.weight.dtype  # the adapter's own is float32
        self.copied = [Snapshot(layer.lora_A[name].weight), Snapshot(layer.lora_B[name].weight)]
        self.down = layer.lora_A[name].weight.detach().to(dtype)  # (rank, in)
        self.up = (layer.lora_B[name].weight.detach() * layer.scaling[name]).T.contiguous().to(dtype)  # (rank, out)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(1, N, in) or (N, in) -> the same with `out`."""
        output, start = self.base(states), self.adapter.start
        if start < states.shape[-2]:
            output[..., start:, :].view(-1, len(self.up.T)).addmm_(
                states[..., start:, :].flatten(0, -2) @ self.down.T, self.up
            )
        return output


class _States(BaseModelOutputWithPast):
    """A body's output whose other fields, such as the router's logits, are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):  # what copy and pickle look for
            raise AttributeError(name)


class PassThrough(nn.Module):
    """Stands in for a model's body and returns the hidden states that it is given."""

    @property
    def decoder(self) -> "PassThrough":  # which OPT calls in the body's place
        return self

    def forward(self, *unused, inputs_embeds: torch.Tensor, **options) -> _States:
        return _States(last_hidden_state=inputs_embeds)


def with_slot_attention(body: PreTrainedModel) -> PreTrainedModel:
    """The same Parameters in new modules that attend with `attention.attend`."""
    refuse_undecodable(type(body), body.config)
    clone = clone_sharing_weights(body.get_decoder())
    clone.set_attn_implementation(IMPLEMENTATION)
    return clone.eval()


def head_of(model: PreTrainedModel, float16_weights: bool = False) -> PreTrainedModel:
    """The model without its body: hidden states -> logits, with the model's soft caps and scales."""
    linear, instead = model.get_output_embeddings(), {model.base_model: PassThrough()}
    if not float16_weights and OneDNNLinear.takes(linear) and linear.weight.nbytes <= MAX_ONEDNN_BYTES:
        instead[linear] = OneDNNLinear(linear)
    head = clone_sharing_weights(model, instead).eval()
    if float16_weights:
        use_float16_weights(head)
    return head


def _move_positions(cache: SlotCache, indices: torch.Tensor) -> torch.Tensor:
    """`SlotCache.move_positions` in the form that CUDAGraphs captures."""
    cache.move_positions(*indices)
    return indices
