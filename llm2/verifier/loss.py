"""The losses of the verifier and the accuracy over pairs. Pure.

Letters: M pairs, N tokens, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

NO_PAIR = -100  # the Trainer's padding when it gathers pair ids from batches and ranks of unequal size
IGNORE_INDEX = -100  # target of tokens without a prediction
LOGITS_CHUNK = 256  # tokens whose vocabulary-sized logits exist at a time


def pairwise_loss(
    margins: torch.Tensor,
    weights: torch.Tensor,
    total: torch.Tensor | None = None,
    margin: float = 0.0,
    targets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted mean over pairs of -log sigmoid(s(gold) - s(negative) - margin) (arXiv 2412.20372; Bradley-Terry).

    With soft targets p, the cross-entropy -p log sigmoid(d) - (1 - p) log sigmoid(-d) of the same difference d.

    Args:
        margins: (..., M) score of gold less score of negative.
        weights: (..., M) 1 for the plain mean.
        total: sum of the weights of the whole optimizer step, over accumulation and ranks, so that the losses of its
            batches add up to the mean over its pairs; the sum of `weights` when None.
        margin: m in -log sigmoid(s+ - s- - m).
        targets: (..., M) probability that gold is better; 1 when None.
    """
    differences = margins.float() - margin
    losses = F.softplus(-differences)
    if targets is not None:
        losses = losses + (1 - targets) * differences
    return (losses * weights).sum() / (weights.sum() if total is None else total).clamp(min=torch.finfo().tiny)


def chunked_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(target); logits exist for LOGITS_CHUNK tokens at a time, in the backward pass too.

    Args:
        hidden: (N, D) last hidden states.
        weight: (V, D) output embedding.
        targets: (N,) token ids.
    """

    def chunk_loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")

    total = hidden.sum() * 0.0  # a zero with a gradient, for a batch without targets
    for hidden_chunk, target_chunk in zip(hidden.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK), strict=True):
        total = total + checkpoint(chunk_loss, hidden_chunk, target_chunk, use_reentrant=False)
    return total


def pair_accuracy(margins: torch.Tensor) -> float:
    """Share of pairs (M,) whose gold token is preferred; a tie counts half."""
    return ((margins > 0).double() + 0.5 * (margins == 0).double()).mean().item()
