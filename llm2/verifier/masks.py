"""Attention masks of branches: tree attention of depth 1. Pure.

A branch is a token that sees a prefix and itself, and is hidden from others. A triplet's negative is a branch of the
gold solution; a decoding candidate is a branch of what was written so far. One forward therefore scores all pairs of a
solution, or all candidates of a step. Each token of a forward, on the trunk or a branch, has

    kv_index    the position of its own key in the KV sequence
    prefix_len  the number of tokens that it sees before itself; this is also its position id

On the trunk both are equal. The keys of branches come after the trunk.

A packed row holds several solutions with their branches, none of which sees another:

    start       the column where the token's solution begins; it sees start <= column < start + prefix_len and itself

Letters: B batch, Q queries, T keys, R packed rows, S columns of a row, N blocks of BLOCK columns.
"""

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig, PreTrainedModel

BLOCK = 128  # columns of a block of FlexAttention


def tree_mask(kv_index: torch.Tensor, prefix_len: torch.Tensor, kv_len: int) -> torch.Tensor:
    """kv_index, prefix_len (B, Q) -> (B, 1, Q, T = kv_len) booleans, True where a query sees a key."""
    key = torch.arange(kv_len, device=kv_index.device)
    return ((key < prefix_len[..., None]) | (key == kv_index[..., None]))[:, None]


def packed_mask(start: torch.Tensor, prefix_len: torch.Tensor) -> torch.Tensor:
    """start, prefix_len (R, S) -> (R, 1, S, S) booleans, True where a query sees a key."""
    column = torch.arange(start.shape[1], device=start.device)
    return tree_mask(column.expand_as(start), start + prefix_len, len(column)) & (column >= start[:, None, :, None])


def packed_block_mask(start: torch.Tensor, prefix_len: torch.Tensor) -> BlockMask:
    """The same mask for FlexAttention, S a multiple of BLOCK: which blocks are empty, partial or full.

    It is built from each query's view of each block, (R, S, N), without anything of size S x S.
    """
    S, end = start.shape[1], start + prefix_len
    low = torch.arange(0, S, BLOCK, device=start.device)  # (N,) first column of each block of keys
    high = low + BLOCK
    first, last = start[..., None], end[..., None]  # (R, S, 1)
    touched = (first < high) & (last > low) & (first < last)  # (R, S, N)
    covered = (first <= low) & (last >= high)
    touched = touched.unflatten(1, (-1, BLOCK)).any(2) | torch.eye(len(low), dtype=torch.bool, device=start.device)
    covered = covered.unflatten(1, (-1, BLOCK)).all(2)  # (R, N, N), as touched now is: every token sees itself

    def visible(row, head, query, key):
        return ((key >= start[row, query]) & (key < end[row, query])) | (key == query)

    partial, full = _sparse(touched & ~covered), _sparse(covered)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK, mask_mod=visible, seq_lengths=(S, S))


def _sparse(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, N, N) booleans -> for each block of queries the number of its key blocks (R, 1, N), and their indices first
    in (R, 1, N, N)."""
    chosen = blocks[:, None].int()
    return chosen.sum(-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).int()


def sliding_window(config: PreTrainedConfig) -> int | None:
    """The sliding window of a backbone, None without: with branch masks a token sees its whole prefix."""
    text = config.get_text_config()
    return getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None


def as_attention_mask(model: PreTrainedModel, mask: torch.Tensor) -> torch.Tensor:
    """The mask in the form that the model's attention expects: booleans for SDPA, a bias for eager attention."""
    if model.config._attn_implementation != "eager":
        return mask
    return torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
