"""Rows that several solutions share: which go together, and what each token of them sees. Pure.

In a row solutions stand one behind the other, each with its branches (see `branches`), and none sees another. A token
in column c is described by two more columns:

    start   where its solution begins
    bound   it sees start <= column < bound, and itself; bound - start is its position

Letters: R rows, S columns, N blocks of BLOCK columns.
"""

from collections.abc import Sequence

import torch
from torch.nn.attention.flex_attention import BlockMask

from llm2.verifier.branches import sees

BLOCK = 128  # columns of a block of FlexAttention


def fill_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into rows of at most `capacity`, each into the first row that has room, the longest first.

    An item longer than that gets a row of its own. Returns the indices of the items, row by row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((row for row, left in enumerate(room) if left >= lengths[index]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(capacity)
        rows[place].append(index)
        room[place] -= lengths[index]
    return rows


def row_mask(start: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """start, bound (R, S) -> (R, 1, S, S) booleans, True where a query sees a key; for SDPA and eager attention."""
    column = torch.arange(start.shape[1], device=start.device)
    return sees(column.expand_as(bound), bound, len(column)) & (column >= start[:, None, :, None])


def row_block_mask(start: torch.Tensor, bound: torch.Tensor) -> BlockMask:
    """The same mask for FlexAttention, S a multiple of BLOCK: which blocks are empty, partial or full.

    It is made from what each query sees of each block, (R, S, N), so that nothing of size S x S ever exists.
    """
    R, S = start.shape
    low = torch.arange(0, S, BLOCK, device=start.device)  # (N,) first column of each block of keys
    high = low + BLOCK
    first, last = start[..., None], bound[..., None]  # (R, S, 1)
    touched = (first < high) & (last > low) & (first < last)  # (R, S, N)
    covered = (first <= low) & (last >= high)
    touched = touched.unflatten(1, (-1, BLOCK)).any(2) | torch.eye(len(low), dtype=torch.bool, device=start.device)
    covered = covered.unflatten(1, (-1, BLOCK)).all(2)  # (R, N, N), as touched now is: every token sees itself

    def visible(row, head, query, key):
        return ((key >= start[row, query]) & (key < bound[row, query])) | (key == query)

    return BlockMask.from_kv_blocks(
        *_listed(touched & ~covered), *_listed(covered), BLOCK, mask_mod=visible, seq_lengths=(S, S)
    )


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, N, N) booleans -> how many blocks of keys each block of queries has (R, 1, N), and which come first."""
    chosen = blocks[:, None].int()
    return chosen.sum(-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).int()
