"""The plausible set of a step and the logits that guidance makes of it. Pure functions on tensors.

Letters: B batch, V vocabulary, K candidates.
"""

import math

import torch

RUN = 64  # tokens of the vocabulary that are ruled out together by their maximum


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
    if alpha <= 0:
        values, candidates = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]), dim=-1)
        return candidates, torch.ones_like(candidates, dtype=torch.bool)
    runs = logits.unflatten(-1, (-1, math.gcd(logits.shape[-1], RUN)))  # (B, V / run, run)
    best = runs.amax(dim=-1)  # (B, V / run): a full sort, or even a comparison, of (B, V) costs ten times as much
    threshold = best.amax(dim=-1, keepdim=True) + math.log(alpha)  # (B, 1)
    row, run = (best >= threshold).nonzero(as_tuple=True)  # (n,): few
    found = runs[row, run]  # (n, run)
    member, offset = (found >= threshold[row]).nonzero(as_tuple=True)  # (m,)
    row, token, value = row[member], run[member] * runs.shape[-1] + offset, found[member, offset]
    if len(row) == len(logits):  # one each: what most steps are
        return token[:, None], torch.ones_like(token[:, None], dtype=torch.bool)
    order = value.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]  # by row, within it best first, within ties the lowest id first
    row, token = row[order], token[order]
    sizes = torch.bincount(row, minlength=len(logits))  # (B,)
    place = torch.arange(len(row), device=row.device) - (sizes.cumsum(0) - sizes)[row]
    width = int(sizes.max())
    candidates = row.new_zeros(len(logits), width)
    candidates[row, place] = token
    valid = torch.arange(width, device=row.device) < sizes[:, None]
    return candidates[:, :top_k], valid[:, :top_k]


def guided_logits(logits: torch.Tensor, valid: torch.Tensor, scores: torch.Tensor | None, beta: float) -> torch.Tensor:
    """z* = z + beta * s on the candidates (arXiv 2412.20372).

    Args:
        logits (B, K) of the candidates, valid (B, K), scores (B, K) or None where System 2 was not asked.

    Returns:
        (B, K); -inf where not valid. Any other token of the vocabulary has -inf.
    """
    guided = logits if scores is None else logits + beta * scores
    return guided.masked_fill(~valid, -math.inf)
