"""The plausible set of a step and the guided logits on it: pure functions of tensors.

Letters: B batch, V vocabulary, K candidates.
"""

import math

import torch

from llm2.errors import UserError

BLOCK = 64  # vocabulary entries ruled out together by their maximum


def plausible(logits: torch.Tensor, alpha: float, top_k: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens whose probability is at least alpha times the largest one, best first (arXiv 2412.20372).

    Args:
        logits: System 1's next-token logits, (B, V).
        alpha: 1 keeps the top token (and exact ties), 0 the whole vocabulary.
        top_k: keep at most this many.

    Returns:
        candidates (B, K) token ids and valid (B, K) booleans; K is the largest count of the batch, the rest of a row is
        padding. The first column is always valid.
    """
    if alpha <= 0:
        candidates = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]), dim=-1).indices
        return candidates, torch.ones_like(candidates, dtype=torch.bool)
    blocks = logits.unflatten(-1, (-1, math.gcd(logits.shape[-1], BLOCK)))  # (B, V / block, block)
    block_max = blocks.amax(dim=-1)  # (B, V / block): sorting or even comparing (B, V) costs ten times as much
    threshold = block_max.amax(dim=-1, keepdim=True) + math.log(alpha)  # (B, 1)
    row, block = (~(block_max < threshold)).nonzero(as_tuple=True)  # (n,): few; all of a row of NaN, for none is left
    kept = blocks[row, block]  # (n, block)
    member, offset = (~(kept < threshold[row])).nonzero(as_tuple=True)  # (m,)
    row, token, value = row[member], block[member] * blocks.shape[-1] + offset, kept[member, offset]
    if len(row) == len(logits):  # one candidate per row, as in most steps
        return token[:, None], torch.ones_like(token[:, None], dtype=torch.bool)
    order = value.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]  # by row, then best first, then lowest id first
    row, token = row[order], token[order]
    sizes = torch.bincount(row, minlength=len(logits))  # (B,)
    column = torch.arange(len(row), device=row.device) - (sizes.cumsum(0) - sizes)[row]
    width = int(sizes.max())
    candidates = row.new_zeros(len(logits), width)
    candidates[row, column] = token
    valid = torch.arange(width, device=row.device) < sizes[:, None]
    return candidates[:, :top_k], valid[:, :top_k]


def guided_logits(logits: torch.Tensor, valid: torch.Tensor, scores: torch.Tensor | None, beta: float) -> torch.Tensor:
    """z* = z + beta * s on the candidates, -inf on padding (arXiv 2412.20372).

    Args:
        logits: of the candidates, (..., K).
        valid: which candidates are real, (..., K).
        scores: the verifier's, (..., K); None where it was not called.
    """
    guided = logits if scores is None else logits + beta * scores
    return guided.masked_fill(~valid, -math.inf)


def check_scores(scores: torch.Tensor, candidates: torch.Tensor, valid: torch.Tensor) -> None:
    """Raises UserError with row and token of the first candidate's score, all (B, K), that is not finite."""
    if (nonfinite := ~scores.isfinite() & valid).any():
        row, column = nonfinite.nonzero()[0].tolist()
        token, score = candidates[row, column].item(), scores[row, column].item()
        raise UserError(
            f"row {row}: the verifier's score of token {token} is {score}, expected a finite number; try dtype=float32"
        )


def over_vocabulary(logits: torch.Tensor, candidates: torch.Tensor, guided: torch.Tensor) -> torch.Tensor:
    """The candidates' guided logits (..., K) in a tensor like logits (..., V); -inf for all other tokens."""
    # The candidates' padding repeats a token id with -inf: the maximum keeps the candidate's own value.
    return torch.full_like(logits, -math.inf).scatter_reduce(-1, candidates, guided.to(logits.dtype), "amax")
