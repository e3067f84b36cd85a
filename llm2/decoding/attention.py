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
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from llm2.decoding.kv_cache import SlotCache
from llm2.verifier.masks import tree_mask

IMPLEMENTATION = "llm2_slots"


@dataclass(frozen=True)
class AttentionParams:
    """A layer's settings."""

    scaling: float
    window: int | None  # a token sees this many last positions, itself included
    softcap: float | None  # scores are squashed to +- this (Gemma 2)


@dataclass(eq=False)
class PrefillRead:
    """Consecutive tokens of one sequence; the last `branches` tokens see everything before them all and themselves."""

    tokens: slice  # of the batch
    slot: int
    start: int  # cache position of the first token
    branches: int = 0
    prefix: tuple[int, int] | None = None  # slot and length of the shared prefix in front of the sequence's slot
    biases: dict[int | None, tuple[bool, torch.Tensor | None]] = field(default_factory=dict)  # by window

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        """Query (1, H, N, D) of the whole batch -> (1, Q, H, D)."""
        if params.window not in self.biases:
            self.biases[params.window] = self._bias(params.window, query)
        causal, bias = self.biases[params.window]
        end = self.start + self.tokens.stop - self.tokens.start
        context = (buffer[self.slot : self.slot + 1, :, :end] for buffer in (keys, values))
        if self.prefix is not None:
            slot, length = self.prefix
            shared = (buffer[slot : slot + 1, :, :length] for buffer in (keys, values))
            context = (torch.cat(parts, dim=2) for parts in zip(shared, context, strict=True))
        return _dot_product(query[:, :, self.tokens], *context, bias, params, causal).transpose(1, 2)

    def _bias(self, window: int | None, like: torch.Tensor) -> tuple[bool, torch.Tensor | None]:
        """Whether the mask is plainly causal; otherwise the bias (Q, W), or None where everything is seen."""
        count = self.tokens.stop - self.tokens.start
        width = (0 if self.prefix is None else self.prefix[1]) + self.start + count
        if window is not None and width > window:
            kv_index = torch.arange(width - count, width, device=like.device)[None]
            prefix_len = kv_index.clamp(max=width - self.branches)
            return False, _bias(kv_index, prefix_len, width, window, like.dtype)[0, 0]
        if count == 1:
            return False, None
        if width == count and self.branches < 2:
            return True, None
        context = 1 << (width - count).bit_length()  # few values, so that the lru_cache hits
        return False, _prefill_bias(count, self.branches, context, like.dtype, like.device)[:, -width:]


@dataclass(eq=False)
class PrefixGroup:
    """Sequences of a DecodeRead that share a prefix."""

    slot: int  # of the prefix
    rows: torch.Tensor  # (G,) indices into the DecodeRead's slots
    lengths: torch.Tensor  # (G,) how much of the prefix each of them sees
    width: int  # the largest of the lengths

    def bias(self, positions: torch.Tensor, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """(G, 1, 1, width), for the cache positions (R,) of the DecodeRead's tokens."""
        position = torch.arange(self.width, device=positions.device)
        visible = position < self.lengths[:, None]
        if window is not None:
            visible &= position > (self.lengths + positions[self.rows])[:, None] - window
        return _as_bias(visible, dtype)[:, None, None]


@dataclass(eq=False)
class DecodeRead:
    """One token each of sequences in neighbouring slots."""

    tokens: slice  # of the batch
    slots: slice  # R of them
    positions: torch.Tensor  # (R,) cache position of each slot's token, which sees all positions up to its own
    width: int  # cache positions that are read
    rows: torch.Tensor | None = None  # (n,) those of the R slots that have a token in the batch; all when None
    groups: Sequence[PrefixGroup] = ()
    biases: dict[int | None, torch.Tensor] = field(default_factory=dict)  # by window; the same in all layers

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        """Query (1, H, N, D) of the whole batch -> (1, n, H, D)."""
        query = query[0, :, self.tokens].transpose(0, 1)[:, :, None]  # (n, H, 1, D)
        if self.rows is not None:  # attending for all R slots is cheaper than copying the keys of n of them
            padded = query.new_zeros(len(self.positions), *query.shape[1:])
            padded[self.rows] = query
            query = padded
        if params.window not in self.biases:
            positions = self.positions[:, None]
            self.biases[params.window] = _bias(positions, positions, self.width, params.window, query.dtype)
        if self.groups:
            output = self._attend_with_prefixes(query, keys, values, params)
        else:
            context = (buffer[self.slots, :, : self.width] for buffer in (keys, values))
            output = _dot_product(query, *context, self.biases[params.window], params)
        output = output[:, :, 0]  # (R, H, D)
        return (output if self.rows is None else output[self.rows])[None]

    def _attend_with_prefixes(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        """Query (R, H, 1, D) -> (R, H, 1, D), with one softmax over a sequence's shared prefix and its slot."""
        slot_keys, slot_values = (buffer[self.slots, :, : self.width] for buffer in (keys, values))
        heads, width = keys.shape[1], max(group.width for group in self.groups)
        query = query[:, :, 0].unflatten(1, (heads, -1))  # (R, J, H / J, D)
        slot_scores = _scaled(query @ slot_keys.transpose(-1, -2), params) + self.biases[params.window]
        scores = torch.cat([slot_scores.new_full((*slot_scores.shape[:3], width), -math.inf), slot_scores], dim=-1)
        for group in self.groups:
            folded = query[group.rows].transpose(0, 1).flatten(1, 2)  # (J, G * H / J, D)
            prefix_scores = _scaled(folded @ keys[group.slot, :, : group.width].transpose(-1, -2), params)
            prefix_scores = prefix_scores.unflatten(1, (len(group.rows), -1)).transpose(0, 1)  # (G, J, H / J, width)
            bias = group.bias(self.positions, params.window, query.dtype)
            scores[group.rows, :, :, : group.width] = prefix_scores + bias
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        output = weights[..., width:] @ slot_values
        for group in self.groups:
            folded = weights[group.rows, :, :, : group.width].transpose(0, 1).flatten(1, 2)
            from_prefix = folded @ values[group.slot, :, : group.width]
            output[group.rows] += from_prefix.unflatten(1, (len(group.rows), -1)).transpose(0, 1)
        return output.flatten(1, 2)[:, :, None]


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
        # Heads that share keys become tokens of one head: CUDA's kernels with a mask do not support grouped heads.
        group_size, count = query.shape[1] // keys.shape[1], query.shape[2]
        folded = query.unflatten(1, (-1, group_size)).flatten(2, 3)  # (R, J, H / J * Q, D)
        if (params.window, group_size) not in self.biases:
            bias = _bias(self.kv_index, self.prefix_len, self.width, params.window, query.dtype)
            self.biases[params.window, group_size] = bias.repeat(1, 1, group_size, 1)  # (R, 1, H / J * Q, W)
        output = _dot_product(folded, *context, self.biases[params.window, group_size], params)
        return output.unflatten(2, (group_size, count)).flatten(1, 2).transpose(1, 2).flatten(0, 1)[None]


@dataclass(eq=False)
class AttentionMetadata:
    """Where the tokens of one forward are stored and what they see."""

    cache: SlotCache
    reads: Sequence[PrefillRead | DecodeRead | PaddedRead]
    slots: torch.Tensor  # (N,)
    kv_positions: torch.Tensor  # (N,) within the slots

    def write(self, buffer: torch.Tensor, states: torch.Tensor) -> None:
        """Store states (1, J, N, D) of the batch."""
        if len(self.reads) == 1 and isinstance(self.reads[0], PrefillRead):  # much faster for a single token
            read = self.reads[0]
            buffer[read.slot, :, read.start : read.start + states.shape[2]] = states[0]
        else:
            buffer[self.slots, :, self.kv_positions] = states[0].transpose(0, 1)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    attention_metadata: AttentionMetadata,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused,
) -> tuple[torch.Tensor, None]:
    """Query (1, H, N, D), key and value (1, J, N, D) -> (1, N, H, D). All keys are written before any is read."""
    keys, values = attention_metadata.cache.layer(module.layer_idx, key)
    attention_metadata.write(keys, key)
    attention_metadata.write(values, value)
    params = AttentionParams(scaling, sliding_window, softcap)
    parts = [read.attend(query, keys, values, params) for read in attention_metadata.reads]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)), None


AttentionInterface.register(IMPLEMENTATION, attend)


def _dot_product(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    params: AttentionParams,
    causal: bool = False,
) -> torch.Tensor:
    """Query (R, H, Q, D), keys and values (R, J, W, D), bias (R, 1, Q, W) or (Q, W) -> (R, H, Q, D)."""
    grouped = query.shape[1] != keys.shape[1]
    slow_sdpa = query.device.type == "cpu" and grouped and query.shape[2] == 1 < len(query)
    if params.softcap is None and not slow_sdpa:
        return scaled_dot_product_attention(
            query, keys, values, bias, is_causal=causal, scale=params.scaling, enable_gqa=grouped
        )
    if causal:
        bias = _as_bias(torch.ones(query.shape[2], keys.shape[2], device=query.device).tril().bool(), query.dtype)
    heads, count = keys.shape[1], query.shape[2]
    folded = query.unflatten(1, (heads, -1)).flatten(2, 3)  # (R, J, H / J * Q, D)
    scores = _scaled(folded @ keys.transpose(-1, -2), params).unflatten(2, (-1, count))  # (R, J, H / J, Q, W)
    if bias is not None:
        scores = scores + (bias if bias.dim() == 2 else bias[:, None])
    weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype).flatten(2, 3)
    return (weights @ values).unflatten(2, (-1, count)).flatten(1, 2)


def _scaled(scores: torch.Tensor, params: AttentionParams) -> torch.Tensor:
    scores = scores * params.scaling
    return scores if params.softcap is None else params.softcap * torch.tanh(scores / params.softcap)


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
