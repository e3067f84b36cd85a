"""The plausible set of a step and the logits that guidance makes of it. Pure functions on tensors.

Letters: B batch, V vocabulary, K candidates.
"""

import math

import torch


def plausible(logits: torch.Tensor, alpha: float, top_k: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens whose probability is at least alpha times the top one's, best first (arXiv 2412.20372).

    Args:
        logits: System 1's next-token logits, (B, V).
        alpha: 1 leaves the top token (and its exact ties), 0 the whole vocabulary.
        top_k: at most so many.

    Returns:
        candidates (B, K) token ids and valid (B, K) booleans; K is the largest count of the batch, and what is not
        valid only fills the rectangle. The first column is always valid.
    """
    threshold = logits.amax(dim=-1, keepdim=True) + (math.log(alpha) if alpha > 0 else -math.inf)  # (B, 1)
    width = int((logits >= threshold).sum(dim=-1).max())
    values, candidates = logits.topk(min(width, top_k or width), dim=-1)  # (B, K)
    return candidates, values >= threshold


def guided_logits(
    logits: torch.Tensor, candidates: torch.Tensor, valid: torch.Tensor, scores: torch.Tensor | None, beta: float
) -> torch.Tensor:
    """z* = z + beta * s on the candidates (arXiv 2412.20372).

    Args:
        logits (B, V), candidates (B, K), valid (B, K), scores (B, K) or None where System 2 was not asked.

    Returns:
        (B, K), column for column with `candidates`; -inf where not valid. Any other token of the vocabulary has -inf.
    """
    guided = logits.gather(-1, candidates)
    if scores is not None:
        guided = guided + beta * scores
    return guided.masked_fill(~valid, -math.inf)
