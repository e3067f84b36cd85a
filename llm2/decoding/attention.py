"""Attention of flat forwards: the tokens of many rows in one line, their keys and values read in place from slots.

The linear layers of a model do not care which row a token belongs to, so a forward takes its tokens in one line without
padding, (1, N): one token each of the rows being continued, the unread tokens of others, candidates that branch off.
Only attention tells rows apart. It is given as `reads`, which between them cover the line in order:

    Step    one token each of many rows, all at once
    Span    consecutive tokens of one row: what it has not read yet, and behind that its branches
    Block   equally many tokens each of many rows, padded to a rectangle: fixed shapes, for a GPU

A row may share the first columns of another slot, its trunk, with other rows: a Step reads it once for all of them.

`attend` is a transformers attention function, registered under `IMPLEMENTATION`; a model that is set to it takes the
reads as the keyword `feed`. Source of reading a shared prefix once: Juravsky et al., arXiv 2402.05099.

Letters: N tokens of a forward, R rows, Q tokens of one row, H heads, J heads of keys, D head width, W columns.
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
class Rule:
    """What a layer asks of attention besides the keys."""

    scaling: float
    window: int | None  # a token sees so many last positions, itself included
    softcap: float | None  # scores are squashed to +- this (Gemma 2)


@dataclass(eq=False)
class Span:
    """Consecutive columns of one row; the last `branches` tokens see what stands before them all and themselves."""

    tokens: slice  # of the line
    slot: int
    start: int  # column of the first token
    branches: int = 0
    trunk: tuple[int, int] | None = None  # slot, and how many of its columns stand before the row's own
    biases: dict[int | None, tuple[bool, torch.Tensor | None]] = field(default_factory=dict)  # a window's

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: Rule) -> torch.Tensor:
        """Query (1, H, N, D) of the whole line -> (1, Q, H, D)."""
        if rule.window not in self.biases:
            self.biases[rule.window] = self._bias(rule.window, query)
        causal, bias = self.biases[rule.window]
        end = self.start + self.tokens.stop - self.tokens.start
        own = (buffer[self.slot : self.slot + 1, :, :end] for buffer in (keys, values))
        if self.trunk is not None:
            slot, width = self.trunk
            shared = (buffer[slot : slot + 1, :, :width] for buffer in (keys, values))
            own = (torch.cat(parts, dim=2) for parts in zip(shared, own, strict=True))
        return _dot_product(query[:, :, self.tokens], *own, bias, rule, causal).transpose(1, 2)

    def _bias(self, window: int | None, like: torch.Tensor) -> tuple[bool, torch.Tensor | None]:
        """Whether it is the plain triangle, and if not, (Q, trunk and own columns) unless all is seen."""
        count = self.tokens.stop - self.tokens.start
        before = 0 if self.trunk is None else self.trunk[1]
        width = before + self.start + count
        if window is not None and width > window:
            return False, _window_bias(count, self.branches, width, window, like)
        if count == 1:
            return False, None
        if width == count and self.branches < 2:
            return True, None
        room = 1 << (width - count).bit_length()  # few values, so that the cache hits
        return False, _span_bias(count, self.branches, room, like.dtype, like.device)[:, -width:]


@dataclass(eq=False)
class Group:
    """Rows of a Step that share a trunk."""

    slot: int  # of the trunk
    rows: torch.Tensor  # (G,) which of the Step's slots
    bounds: torch.Tensor  # (G,) how many of the trunk's columns each of them sees
    width: int  # the largest of the bounds


@dataclass(eq=False)
class Step:
    """One token each of rows whose slots lie side by side."""

    tokens: slice  # of the line
    slots: slice
    columns: torch.Tensor  # (R,) of each slot's token: it sees itself and the columns before
    width: int  # the largest column, and one
    rows: torch.Tensor | None = None  # (n,) those of the R slots that have a token in the line; all when None
    groups: Sequence[Group] = ()
    biases: dict[int | None, torch.Tensor] = field(default_factory=dict)  # a window's; the same in all layers

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: Rule) -> torch.Tensor:
        """Query (1, H, N, D) of the whole line -> (1, n, H, D)."""
        query = query[0, :, self.tokens].transpose(0, 1)[:, :, None]  # (n, H, 1, D)
        if self.rows is not None:  # the other rows are read too, for nothing: cheaper than to copy the keys of these
            spread = query.new_zeros(len(self.columns), *query.shape[1:])
            spread[self.rows] = query
            query = spread
        own = (buffer[self.slots, :, : self.width] for buffer in (keys, values))
        if self.groups:
            output = _with_trunks(query, *own, keys, values, self._bias(rule.window, query), self, rule)
        else:
            output = _dot_product(query, *own, self._bias(rule.window, query), rule)
        output = output[:, :, 0]  # (R, H, D)
        return (output if self.rows is None else output[self.rows])[None]

    def _bias(self, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """(R, 1, 1, W): 0 where a row sees a column of its own, else -inf."""
        if window not in self.biases:
            column = torch.arange(self.width, device=like.device)
            seen = column <= self.columns[:, None]
            if window is not None:
                seen &= column > self.columns[:, None] - window
            self.biases[window] = _bias_of(seen, like.dtype)[:, None, None]
        return self.biases[window]


@dataclass(eq=False)
class Block:
    """A rectangle of tokens, Q each of R rows."""

    tokens: slice  # of the line, row by row
    slots: slice | torch.Tensor  # (R,); a slice is read in place
    own: torch.Tensor  # (R, Q) columns; negative ones, from the end, are of tokens that only fill the rectangle
    bound: torch.Tensor  # (R, Q) how many columns a token sees besides its own
    width: int  # columns that are read
    biases: dict[tuple[int | None, int], torch.Tensor] = field(default_factory=dict)  # the same in all layers

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: Rule) -> torch.Tensor:
        """Query (1, H, N, D) of the whole line -> (1, R * Q, H, D)."""
        query = query[0, :, self.tokens].unflatten(1, self.own.shape).transpose(0, 1)  # (R, H, Q, D)
        own = (buffer[self.slots, :, : self.width] for buffer in (keys, values))
        # Heads that share keys as tokens of one head: CUDA's kernels for a mask know no grouped heads.
        groups, count = query.shape[1] // keys.shape[1], query.shape[2]
        folded = query.unflatten(1, (-1, groups)).flatten(2, 3)  # (R, J, H / J * Q, D)
        output = _dot_product(folded, *own, self._bias(rule.window, groups, query), rule)
        return output.unflatten(2, (groups, count)).flatten(1, 2).transpose(1, 2).flatten(0, 1)[None]

    def _bias(self, window: int | None, groups: int, like: torch.Tensor) -> torch.Tensor:
        """(R, 1, groups * Q, W)."""
        if (window, groups) not in self.biases:
            seen = tree_mask(self.own, self.bound, self.width)
            if window is not None:
                column = torch.arange(self.width, device=like.device)
                near = (column > self.bound[..., None] - window) | (column == self.own[..., None])
                seen = seen & near[:, None]
            self.biases[window, groups] = _bias_of(seen, like.dtype).repeat(1, 1, groups, 1)
        return self.biases[window, groups]


@dataclass(eq=False)
class Feed:
    """Where the tokens of one forward go and what they see."""

    cache: SlotCache
    reads: Sequence[Span | Step | Block]
    slots: torch.Tensor  # (N,)
    columns: torch.Tensor  # (N,)

    def write(self, buffer: torch.Tensor, states: torch.Tensor) -> None:
        """States (1, J, N, D) of the line -> their columns of the slots."""
        if len(self.reads) == 1 and isinstance(self.reads[0], Span):  # much the quicker for a single token
            span = self.reads[0]
            buffer[span.slot, :, span.start : span.start + states.shape[2]] = states[0]
        else:
            buffer[self.slots, :, self.columns] = states[0].transpose(0, 1)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    feed: Feed,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused,
) -> tuple[torch.Tensor, None]:
    """Query (1, H, N, D), key and value (1, J, N, D) -> (1, N, H, D). All keys are written before any is read."""
    keys, values = feed.cache.layer(module.layer_idx, key)
    feed.write(keys, key)
    feed.write(values, value)
    rule = Rule(scaling, sliding_window, softcap)
    parts = [read.attend(query, keys, values, rule) for read in feed.reads]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)), None


AttentionInterface.register(IMPLEMENTATION, attend)


def _dot_product(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    rule: Rule,
    causal: bool = False,
) -> torch.Tensor:
    """Query (R, H, Q, D), keys and values (R, J, W, D), bias (R, 1, Q, W) or (Q, W) -> (R, H, Q, D)."""
    shared = query.shape[1] != keys.shape[1]
    single = query.device.type == "cpu" and shared and query.shape[2] == 1 < len(query)  # where SDPA is the slower
    if rule.softcap is None and not single:
        return scaled_dot_product_attention(
            query, keys, values, bias, is_causal=causal, scale=rule.scaling, enable_gqa=shared
        )
    if causal:
        bias = _bias_of(torch.ones(query.shape[2], keys.shape[2], device=query.device).tril().bool(), query.dtype)
    heads, count = keys.shape[1], query.shape[2]
    folded = query.unflatten(1, (heads, -1)).flatten(2, 3)  # (R, J, H / J * Q, D)
    scores = _capped(folded @ keys.transpose(-1, -2), rule).unflatten(2, (-1, count))  # (R, J, H / J, Q, W)
    if bias is not None:
        scores = scores + (bias if bias.dim() == 2 else bias[:, None])
    share = scores.softmax(-1, dtype=torch.float32).to(values.dtype).flatten(2, 3)
    return (share @ values).unflatten(2, (-1, count)).flatten(1, 2)


def _with_trunks(
    query: torch.Tensor,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    step: Step,
    rule: Rule,
) -> torch.Tensor:
    """As `_dot_product` for one token a row, whose softmax runs over its trunk's columns and its own together."""
    heads, width = own_keys.shape[1], max(group.width for group in step.groups)
    query = query[:, :, 0].unflatten(1, (heads, -1))  # (R, J, H / J, D)
    own = _capped(query @ own_keys.transpose(-1, -2), rule) + bias  # (R, J, H / J, W)
    scores = torch.cat([own.new_full((*own.shape[:3], width), -math.inf), own], dim=-1)
    for group in step.groups:
        folded = query[group.rows].transpose(0, 1).flatten(1, 2)  # (J, G * H / J, D)
        found = folded @ keys[group.slot, :, : group.width].transpose(-1, -2)
        found = _capped(found, rule).unflatten(1, (len(group.rows), -1)).transpose(0, 1)  # (G, J, H / J, width)
        scores[group.rows, :, :, : group.width] = found + _trunk_bias(group, step, rule.window, query)
    share = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    output = share[..., width:] @ own_values
    for group in step.groups:
        folded = share[group.rows, :, :, : group.width].transpose(0, 1).flatten(1, 2)
        found = (folded @ values[group.slot, :, : group.width]).unflatten(1, (len(group.rows), -1)).transpose(0, 1)
        output[group.rows] += found
    return output.flatten(1, 2)[:, :, None]


def _trunk_bias(group: Group, step: Step, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """(G, 1, 1, width): which columns of the trunk each row sees."""
    column = torch.arange(group.width, device=like.device)
    seen = column < group.bounds[:, None]
    if window is not None:
        seen &= column > (group.bounds + step.columns[group.rows])[:, None] - window
    return _bias_of(seen, like.dtype)[:, None, None]


def _capped(scores: torch.Tensor, rule: Rule) -> torch.Tensor:
    scores = scores * rule.scaling
    return scores if rule.softcap is None else rule.softcap * torch.tanh(scores / rule.softcap)


def _bias_of(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Booleans -> what is added to attention's scores."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)


@lru_cache(maxsize=1024)
def _span_bias(count: int, branches: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(Q, columns + Q), its last columns those of the span's tokens: a Span's bias is the right end of this one."""
    tail = torch.ones(count, count, dtype=torch.bool, device=device).tril()
    first = count - branches
    tail[first:, first:] = torch.eye(branches, dtype=torch.bool, device=device)
    return _bias_of(torch.cat([tail.new_ones(count, columns), tail], dim=-1), dtype)


def _window_bias(count: int, branches: int, width: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """(Q, width) of a span that ends in the last column: as `_span_bias`, and no further back than the window."""
    own = torch.arange(width - count, width, device=like.device)
    bound = own.clamp(max=width - branches)
    seen = tree_mask(own[None], bound[None], width)[0, 0]
    column = torch.arange(width, device=like.device)
    return _bias_of(seen & ((column > bound[:, None] - window) | (column == own[:, None])), like.dtype)
