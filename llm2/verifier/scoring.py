"""The verifier's score of every token of finished solutions.

Knows one plain forward over prompt and solution, for texts that are already written: to rank them, to let them vote
with weights, to colour them. Scores that take part in the writing itself are `generation`'s.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from llm2.verifier.model import ProcessVerifier

Reduction = Literal["mean", "min", "last"]


@torch.inference_mode()
def score_tokens(
    verifier: ProcessVerifier,
    prompts: Sequence[Sequence[int]],
    solutions: Sequence[Sequence[int]],
    batch_size: int = 16,
) -> list[list[float]]:
    """Scores of the solutions' tokens, each in the context of what stands before it; a list a solution.

    Args:
        prompts: token ids, none empty.
        solutions: token ids that follow the prompt of the same index.
        batch_size: texts a forward; those of like lengths are read together.
    """
    texts = [torch.tensor([*prompt, *solution]) for prompt, solution in zip(prompts, solutions, strict=True)]
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found: dict[int, list[float]] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids = pad_sequence([texts[index] for index in batch], batch_first=True)  # (B, S), right-padded
        lengths = torch.tensor([len(texts[index]) for index in batch])
        keep = torch.arange(ids.shape[1]) < lengths[:, None]  # (B, S)
        scores = verifier(ids.to(verifier.device), attention_mask=keep.long().to(verifier.device)).scores  # (B, S)
        for index, row in zip(batch, scores.float().cpu(), strict=True):
            found[index] = row[len(prompts[index]) : len(texts[index])].tolist()
    return [found[index] for index in range(len(texts))]


def solution_score(scores: Sequence[float], reduction: Reduction) -> float:
    """One figure for a whole solution: how its tokens are liked on average, at the worst, or at the end."""
    if reduction == "mean":
        return sum(scores) / len(scores)
    return min(scores) if reduction == "min" else scores[-1]
