"""The losses of the verifier and the accuracy over pairs. Pure.

Letters: M pairs, N tokens, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

NO_PAIR = -100  # in place of a pair's number where ranks or batches with fewer pairs are filled up
IGNORE_INDEX = -100  # in place of the token to foretell where there is none
CHUNK = 256  # tokens whose vocabulary-sized logits exist at a time


def pairwise_loss(
    margins: torch.Tensor, weights: torch.Tensor, total: torch.Tensor | None = None, margin: float = 0.0
) -> torch.Tensor:
    """Weighted mean over pairs of -log sigmoid(s(gold) - s(negative) - margin) (arXiv 2412.20372; Bradley-Terry).

    Args:
        margins: (..., M) score of gold less score of negative.
        weights: (..., M) of each pair: 1 in the plain mean, 0 where there is no pair.
        total: sum of the weights of the whole optimizer step, over accumulation and ranks; with it the parts of a step
            add up to the mean over its pairs. That of `weights` when None.
        margin: by how much gold's score is to exceed the negative's before a pair counts as even.
    """
    losses = F.softplus(margin - margins.float())
    return (losses * weights).sum() / (weights.sum() if total is None else total).clamp(min=torch.finfo().tiny)


def chunked_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(token) over tokens to foretell; logits exist for CHUNK tokens at a time, also in the backward pass.

    Args:
        hidden: (N, D) last hidden states.
        weight: (V, D) output embedding.
        targets: (N,) token ids.
    """

    def part(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")

    total = hidden.sum() * 0.0  # of no token at all; keeps the graph
    for states, tokens in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        total = total + checkpoint(part, states, tokens, use_reentrant=False)
    return total


def pair_accuracy(margins: torch.Tensor) -> float:
    """Share of pairs (1-D) whose gold token is preferred; a tie counts half."""
    return ((margins > 0).double() + 0.5 * (margins == 0).double()).mean().item()
