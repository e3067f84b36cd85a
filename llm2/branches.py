"""Tokens that branch off a prefix: their ids, positions and attention mask. Pure.

A branch is a token that sees the trunk up to its slot and itself, sits at the position right after what it sees, and is
invisible to everything else. A triplet's negative is a branch of the gold solution; a decoding candidate is a branch of
what was written so far. One forward therefore scores all pairs of a solution, or all candidates of a step.

Letters: B batch, T trunk columns (cached ones first), N trunk columns not cached yet, P branches.
"""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel


class Branched(NamedTuple):
    """The input of one forward. Queries are the N new trunk columns, then the P branches."""

    input_ids: torch.Tensor  # (B, N + P)
    position_ids: torch.Tensor  # (B, N + P)
    attention_mask: torch.Tensor  # (B, 1, N + P, T + P) booleans, True where a query sees a key

    def mask_for(self, model: PreTrainedModel) -> torch.Tensor:
        """The mask as the model's attention takes it: booleans for SDPA, for the eager one what is added to logits."""
        if model.config._attn_implementation != "eager":
            return self.attention_mask
        low = torch.finfo(model.dtype).min
        return torch.zeros_like(self.attention_mask, dtype=model.dtype).masked_fill(~self.attention_mask, low)


def branch(trunk_mask: torch.Tensor, new_ids: torch.Tensor, branch_ids: torch.Tensor, slots: torch.Tensor) -> Branched:
    """Lay P branches of each row behind its trunk.

    Args:
        trunk_mask: (B, T) booleans, False on padding (left or right). The first T - N columns are in the KV cache.
        new_ids: (B, N) ids of the last N trunk columns.
        branch_ids: (B, P) ids of the branches.
        slots: (B, P) trunk column, 0 to T, in whose place a branch stands: it sees the real columns before it. A branch
            that only fills the rectangle may have any slot; it disturbs nobody.
    """
    (B, T), N, P = trunk_mask.shape, new_ids.shape[1], branch_ids.shape[1]
    column = torch.arange(T, device=trunk_mask.device)
    seen = torch.nn.functional.pad(trunk_mask.cumsum(-1), (1, 0))  # (B, T + 1): real columns before each slot
    new = column[T - N :]  # (N,)

    trunk_to_trunk = (column <= new[:, None]) & trunk_mask[:, None]  # (B, N, T)
    trunk_to_trunk = trunk_to_trunk | (column == new[:, None])  # padding sees itself: no empty softmax
    branch_to_trunk = (column < slots[:, :, None]) & trunk_mask[:, None]  # (B, P, T)
    itself = torch.eye(P, dtype=torch.bool, device=column.device).expand(B, P, P)
    nobody = torch.zeros(B, N, P, dtype=torch.bool, device=column.device)
    mask = torch.cat(
        [torch.cat([trunk_to_trunk, nobody], dim=-1), torch.cat([branch_to_trunk, itself], dim=-1)], dim=-2
    )
    return Branched(
        input_ids=torch.cat([new_ids, branch_ids], dim=-1),
        position_ids=torch.cat([seen[:, T - N : T], seen.gather(-1, slots)], dim=-1),
        attention_mask=mask[:, None],
    )
