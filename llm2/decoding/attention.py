"""Attention over a flat batch: tokens of many sequences in one row, keys and values read in place from cache slots.

Linear layers do not care which sequence a token belongs to, so a forward takes all its tokens as one row, (1, N). Only
attention separates the sequences. `AttentionMetadata.reads` says how; together the reads cover the row in order:

    DecodeRead    one token each of many sequences, in one call
    PrefillRead   consecutive tokens of one sequence, and behind them its branches (candidates)
    PaddedRead    Q tokens each of R sequences, padded to a rectangle: fixed shapes, for a GPU

Sequences can share a prefix that lies in a separate slot; on a CPU a DecodeRead attends to it once for all of them
(Juravsky et al., arXiv 2402.05099).

`attend` is a transformers attention function, registered under `IMPLEMENTATION`. A model set to it takes the metadata
as the keyword argument `attention_metadata`.

Letters: N tokens of a forward, R sequences, Q tokens per sequence, H heads, J key heads, D head width, W positions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from llm2.decoding.kv_cache import SlotCache
from llm2.verifier.masks import tree_mask

IMPLEMENTATION = "llm2_slots"
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # what SDPA calls; returns the logarithms too


@dataclass(frozen=True)
class AttentionParams:
    """A layer's settings."""

    scaling: float
    window: int | None  # a token sees this many last positions, itself included
    softcap: float | None  # scores are squashed to +- this (Gemma 2)
    has_sinks: bool = False
    sinks: torch.Tensor | None = field(default=None, compare=False)  # (H,) a score for seeing nothing (gpt-oss)

    def with_sinks(self, output: torch.Tensor, log_total: torch.Tensor) -> torch.Tensor:
        """What `_partial` returned (R, J, H / J * Q, D), with the sinks under the same softmax."""
        if self.sinks is None:
            return output
        _, heads, count = log_total.shape
        sinks = self.sinks.float().view(heads, -1, 1).expand(-1, -1, count * heads // len(self.sinks))
        return output * torch.sigmoid(log_total - sinks.flatten(1)).to(output.dtype)[..., None]


@dataclass(eq=False)
class PrefillRead:
    """Consecutive tokens of one sequence; the last `branches` tokens see everything before them all and themselves."""

    tokens: slice  # of the batch
    slot: int
    start: int  # cache position of the first token
    branches: int = 0
    prefix: tuple[int, int] | None = None  # slot and length of the shared prefix in front of the sequence's slot
    biases: dict[AttentionParams, tuple[bool, torch.Tensor | None]] = field(default_factory=dict)

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        """Query (1, H, N, D) of the whole batch -> (1, Q, H, D)."""
        query, heads = query[:, :, self.tokens], keys.shape[1]
        if params not in self.biases:
            self.biases[params] = self._bias(params, query, query.shape[1] // heads)
        causal, bias = self.biases[params]
        count = query.shape[2]
        context = (buffer[self.slot : self.slot + 1, :, : self.start + count] for buffer in (keys, values))
        if self.prefix is not None:
            slot, length = self.prefix
            shared = (buffer[slot : slot + 1, :, :length] for buffer in (keys, values))
            context = (torch.cat(parts, dim=2) for parts in zip(shared, context, strict=True))
        if causal:
            options = {"is_causal": True, "scale": params.scaling, "enable_gqa": True}
            return scaled_dot_product_attention(query, *context, **options).transpose(1, 2)
        return _unfolded(_dot_product(_folded(query, heads), *context, bias, params), count)

    def _bias(self, params: AttentionParams, like: torch.Tensor, group_size: int) -> tuple[bool, torch.Tensor | None]:
        """Whether the mask is plainly causal; otherwise the bias (H / J * Q, W), or None where everything is seen."""
        count = self.tokens.stop - self.tokens.start
        width = (0 if self.prefix is None else self.prefix[1]) + self.start + count
        if params.window is not None and width > params.window:
            kv_index = torch.arange(width - count, width, device=like.device)[None]
            prefix_len = kv_index.clamp(max=width - self.branches)
            bias = _bias(kv_index, prefix_len, width, params.window, like.dtype)[0, 0]
        elif count == 1:
            return False, None
        elif width == count and self.branches < 2 and params.softcap is None and not params.has_sinks:
            return True, None
        else:
            context = 1 << (width - count).bit_length()  # few values, so that the lru_cache hits
            bias = _prefill_bias(count, self.branches, context, like.dtype, like.device)[:, -width:]
        return False, bias.repeat(group_size, 1)


@dataclass(eq=False)
class PrefixGroup:
    """Sequences of a DecodeRead that share a prefix."""

    slot: int  # of the prefix
    members: slice  # G of the DecodeRead's `grouped`
    lengths: torch.Tensor  # (G,) how much of the prefix each of them sees
    positions: torch.Tensor  # (G,) cache positions of their tokens
    biases: dict[int | None, torch.Tensor | None] = field(default_factory=dict)  # by window

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Query (J, n, H / J, D) of all grouped tokens -> (J, G * H / J, D), and (J, G * H / J) as `_partial`."""
        width, group_size = int(self.lengths.max()), query.shape[2]
        if params.window not in self.biases:
            self.biases[params.window] = self._bias(width, params.window, query.dtype, group_size)
        context = (buffer[self.slot, :, :width][None] for buffer in (keys, values))
        folded = query[:, self.members].flatten(1, 2)[None]
        output, log_total = _partial(folded, *context, self.biases[params.window], params)
        return output[0], log_total[0]

    def _bias(self, width: int, window: int | None, dtype: torch.dtype, group_size: int) -> torch.Tensor | None:
        """Attention bias (1, 1, G * H / J, width); None if every token sees the whole prefix."""
        position = torch.arange(width, device=self.lengths.device)
        visible = position < self.lengths[:, None]
        if window is not None:
            visible &= position > (self.lengths + self.positions)[:, None] - window
        if visible.all():
            return None
        # Finite: a token may see nothing of the prefix, whose weight is then 0 once both parts are merged.
        bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min / 2)
        return bias.repeat_interleave(group_size, dim=0)[None, None]


@dataclass(eq=False)
class DecodeRead:
    """One token each of sequences in neighbouring slots."""

    tokens: slice  # of the batch
    slots: slice  # R of them
    positions: torch.Tensor  # (R,) cache position of each slot's token, which sees all positions up to its own
    width: int  # cache positions that are read
    rows: torch.Tensor | None = None  # (n,) those of the R slots that have a token in the batch; all when None
    grouped: torch.Tensor | None = None  # those of the R slots that have a prefix, group by group
    groups: Sequence[PrefixGroup] = ()
    biases: dict[int | None, torch.Tensor] = field(default_factory=dict)  # by window; the same in all layers

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        """Query (1, H, N, D) of the whole batch -> (1, n, H, D)."""
        query = query[0, :, self.tokens].transpose(0, 1)  # (n, H, D)
        if self.rows is not None:  # attending for all R slots is cheaper than copying the keys of n of them
            padded = query.new_zeros(len(self.positions), *query.shape[1:])
            padded[self.rows] = query
            query = padded
        if params.window not in self.biases:
            positions = self.positions[:, None]
            self.biases[params.window] = _bias(positions, positions, self.width, params.window, query.dtype)
        query = query.unflatten(1, (keys.shape[1], -1))  # (R, J, H / J, D)
        context = (buffer[self.slots, :, : self.width] for buffer in (keys, values))
        output, log_total = _partial(query, *context, self.biases[params.window], params)
        if self.groups:
            output, log_total = self._with_prefixes(query, output, log_total, keys, values, params)
        output = params.with_sinks(output, log_total).flatten(1, 2)  # (R, H, D)
        return (output if self.rows is None else output[self.rows])[None]

    def _with_prefixes(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        log_total: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        params: AttentionParams,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `_partial` returned for the slots, (R, J, H / J, D) and the logarithms, with shared prefixes under the
        same softmax."""
        group_size = query.shape[2]
        shared = query[self.grouped].transpose(0, 1)  # (J, n, H / J, D)
        parts = [group.attend(shared, keys, values, params) for group in self.groups]
        of_prefix, prefix_total = (
            torch.cat(part, dim=1).unflatten(1, (-1, group_size)).transpose(0, 1) for part in zip(*parts, strict=True)
        )
        own_total = log_total[self.grouped]
        share = torch.sigmoid(prefix_total - own_total).to(output.dtype)
        output[self.grouped] = torch.lerp(output[self.grouped], of_prefix, share[..., None])
        log_total[self.grouped] = torch.logaddexp(prefix_total, own_total)
        return output, log_total


@dataclass(eq=False)
class PaddedRead:
    """A rectangle of tokens, Q each of R sequences."""

    tokens: slice  # of the batch, sequence by sequence
    slots: slice | torch.Tensor  # (R,); a slice is read in place
    kv_index: torch.Tensor  # (R, Q) cache positions of the tokens; negative, from the end, for padding
    prefix_len: torch.Tensor  # (R, Q) how many first positions a token sees besides its own
    width: int  # cache positions that are read
    biases: dict[tuple[int | None, int], torch.Tensor] = field(default_factory=dict)  # by window and group size

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        """Query (1, H, N, D) of the whole batch -> (1, R * Q, H, D)."""
        query = query[0, :, self.tokens].unflatten(1, self.kv_index.shape).transpose(0, 1)  # (R, H, Q, D)
        context = (buffer[self.slots, :, : self.width] for buffer in (keys, values))
        heads, count = keys.shape[1], query.shape[2]
        group_size = query.shape[1] // heads
        if (params.window, group_size) not in self.biases:
            bias = _bias(self.kv_index, self.prefix_len, self.width, params.window, query.dtype)
            self.biases[params.window, group_size] = bias.repeat(1, 1, group_size, 1)  # (R, 1, H / J * Q, W)
        output = _dot_product(_folded(query, heads), *context, self.biases[params.window, group_size], params)
        return _unfolded(output, count).flatten(0, 1)[None]


@dataclass(eq=False)
class AttentionMetadata:
    """Where the tokens of one forward are stored and what they see."""

    cache: SlotCache
    reads: Sequence[PrefillRead | DecodeRead | PaddedRead]
    slots: torch.Tensor  # (N,)
    kv_positions: torch.Tensor  # (N,) within the slots
    lines: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)  # see `write`; the same in all layers

    def write(self, buffer: torch.Tensor, states: torch.Tensor) -> None:
        """Store states (1, J, N, D) of the batch."""
        if len(self.reads) == 1 and isinstance(self.reads[0], PrefillRead):  # much faster for a single token
            read = self.reads[0]
            buffer[read.slot, :, read.start : read.start + states.shape[2]] = states[0]
            return
        _, heads, capacity, width = buffer.shape
        if (heads, capacity) not in self.lines:  # (N * J,) of the buffer as lines of D numbers
            first = self.slots[:, None] * heads + torch.arange(heads, device=self.slots.device)
            self.lines[heads, capacity] = (first * capacity + (self.kv_positions % capacity)[:, None]).flatten()
        buffer.view(-1, width)[self.lines[heads, capacity]] = states[0].transpose(0, 1).reshape(-1, width)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    attention_metadata: AttentionMetadata,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **unused,
) -> tuple[torch.Tensor, None]:
    """Query (1, H, N, D), key and value (1, J, N, D) -> (1, N, H, D). All keys are written before any is read.

    `common.architecture` refuses models that hand over anything else. Values may have another width than keys.
    """
    scaling, width = query.shape[-1] ** -0.5 if scaling is None else scaling, value.shape[-1]
    if width != key.shape[-1]:  # torch's kernels want one width: zeros add nothing
        full = max(width, key.shape[-1])
        query, key, value = (pad(states, (0, full - states.shape[-1])) for states in (query, key, value))
    keys, values = attention_metadata.cache.layer(module.layer_idx, key)
    attention_metadata.write(keys, key)
    attention_metadata.write(values, value)
    params = AttentionParams(scaling, sliding_window, softcap, s_aux is not None, s_aux)
    parts = [read.attend(query, keys, values, params) for read in attention_metadata.reads]
    output = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return output[..., :width].contiguous(), None  # some models view it


AttentionInterface.register(IMPLEMENTATION, attend)


def _folded(query: torch.Tensor, heads: int) -> torch.Tensor:
    """(R, H, Q, D) -> (R, J, H / J * Q, D): heads that share keys become tokens of one head.

    CUDA's kernels with a mask do not support grouped heads, and on a CPU SDPA copies the keys for each of them.
    """
    return query.unflatten(1, (heads, -1)).flatten(2, 3)


def _unfolded(output: torch.Tensor, count: int) -> torch.Tensor:
    """(R, J, H / J * Q, D) -> (R, Q, H, D)."""
    return output.unflatten(2, (-1, count)).flatten(1, 2).transpose(1, 2)


def _dot_product(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, params: AttentionParams
) -> torch.Tensor:
    """Query (R, J, Q, D), keys and values (R, J, W, D), bias (R, 1, Q, W) or (Q, W) -> (R, J, Q, D)."""
    if params.softcap is None and not params.has_sinks:
        return scaled_dot_product_attention(query, keys, values, bias, scale=params.scaling)
    return params.with_sinks(*_partial(query, keys, values, bias, params))


def _partial(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, params: AttentionParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to a part of what the tokens see, and the logarithm of what its softmax divides by.

    Shapes as in `_dot_product`; the logarithms are (R, J, Q) float32.
    """
    if params.softcap is None and query.device.type == "cpu":  # a row whose bias is -inf throughout would be wrong
        return FLASH(query, keys, values, attn_mask=bias, scale=params.scaling)
    scores = query @ keys.transpose(-1, -2) * params.scaling
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    if bias is not None:
        scores = scores + bias
    log_total = scores.float().logsumexp(-1)
    return (scores - log_total[..., None]).exp().to(values.dtype) @ values, log_total


def _as_bias(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Boolean mask -> what is added to attention scores."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -math.inf)


def _bias(
    kv_index: torch.Tensor, prefix_len: torch.Tensor, width: int, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """(R, 1, Q, width) for tokens with kv_index and prefix_len (R, Q), under a sliding window if there is one."""
    visible = tree_mask(kv_index, prefix_len, width)
    if window is not None:
        position = torch.arange(width, device=kv_index.device)
        near = (position > prefix_len[..., None] - window) | (position == kv_index[..., None])
        visible = visible & near[:, None]
    return _as_bias(visible, dtype)


@lru_cache(maxsize=1024)
def _prefill_bias(count: int, branches: int, context: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(Q, context + Q) for Q tokens behind `context` positions; a shorter context is its right end."""
    tail = torch.ones(count, count, dtype=torch.bool, device=device).tril()
    first = count - branches
    tail[first:, first:] = torch.eye(branches, dtype=torch.bool, device=device)
    return _as_bias(torch.cat([tail.new_ones(count, context), tail], dim=-1), dtype)
