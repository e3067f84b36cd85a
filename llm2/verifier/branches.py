"""Tokens that branch off a prefix: where they stand and what they see. Pure.

A branch is a token that sees the first tokens of a trunk and itself, and is invisible to everything else. A triplet's
negative is a branch of the gold solution; a decoding candidate is a branch of what was written so far. One forward
therefore scores all pairs of a solution, or all candidates of a step.

Every token of a forward, of the trunk or a branch, is described by two numbers:

    own     the column of keys that holds the token itself
    bound   how many columns from the left it sees besides; this is also its position

A trunk token in column c has own = bound = c. A branch in the place of trunk column c has bound = c and an own column
behind the trunk. Trunks begin in column 0, so nothing is ever padded on the left, and what fills a rectangle on the
right lies beyond every bound that counts.

Letters: B batch, Q tokens of the forward (queries), C columns of keys.
"""

import torch
from transformers import PreTrainedModel


def sees(own: torch.Tensor, bound: torch.Tensor, columns: int) -> torch.Tensor:
    """The attention mask: own (B, Q), bound (B, Q) -> (B, 1, Q, C) booleans, True where a query sees a key."""
    column = torch.arange(columns, device=own.device)
    return ((column < bound[..., None]) | (column == own[..., None]))[:, None]


def mask_for(model: PreTrainedModel, mask: torch.Tensor) -> torch.Tensor:
    """The mask as the model's attention takes it: booleans for SDPA, for the eager one what is added to logits."""
    if model.config._attn_implementation != "eager":
        return mask
    return torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
