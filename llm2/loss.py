"""The pairwise loss of the verifier and its metrics. Pure.

Letters: M pairs of the rectangle, real or not.
"""

import torch
import torch.nn.functional as F

NO_PAIR = -100  # label of what only fills the rectangle; the value by which transformers' Trainer counts items


def pairwise_loss(
    margins: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Mean over real pairs of -log sigmoid(s(gold) - s(negative)) (arXiv 2412.20372; Bradley-Terry).

    Args:
        margins: (..., M) score of gold less score of negative.
        labels: (..., M) NO_PAIR where there is no pair.
        num_items_in_batch: real pairs of the whole optimizer step, over accumulation and ranks; with it the parts of a
            step add up to the mean over its pairs. Those of `margins` when None.
    """
    real = labels != NO_PAIR
    total = F.softplus(-margins.float()).masked_fill(~real, 0).sum()
    return total / (real.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def pair_accuracy(margins: torch.Tensor) -> float:
    """Share of pairs (1-D, all real) whose gold token is preferred; a tie counts half."""
    return ((margins > 0).float() + 0.5 * (margins == 0).float()).mean().item()
