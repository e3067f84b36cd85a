"""Examples -> the batch of one verifier forward: solutions packed in rows, their negatives as branches behind them.

Letters: R rows, S columns, M pairs of the batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from llm2.verifier.loss import IGNORE_INDEX
from llm2.verifier.packing import fill_rows
from llm2.verifier.triplets import Example


class VerifierBatch(NamedTuple):
    """What ProcessVerifier.forward takes, and what the loss and the metrics want to know besides."""

    input_ids: torch.Tensor  # (R, S)
    start: torch.Tensor  # (R, S) first column of the token's solution
    bound: torch.Tensor  # (R, S) the token sees start <= column < bound, and itself
    pairs: torch.Tensor  # (1, M, 2) of gold and negative, the places in the R * S columns of the batch
    labels: torch.Tensor  # (1, M) float32: the weight of each pair in the loss
    numbers: torch.Tensor  # (1, M) by which the metrics know each pair
    targets: torch.Tensor | None  # (R, S) the token that follows in the solution, or IGNORE_INDEX; for the LM loss


def verifier_batch(
    examples: Sequence[Example],
    *,
    capacity: int | None = None,
    multiple: int = 1,
    quality_weight: bool = False,
    language: bool = False,
) -> VerifierBatch:
    """Lay out solutions and all their pairs.

    Two triplets with the same position and negative share a branch and stay two pairs. Example:

        solutions of ids [5, 6, 7, 4] and [3, 2] with the triplets [1, 6, 9], [1, 6, 9], [2, 7, 8] and [1, 2, 1] give
        input_ids [[5, 6, 7, 9, 8], [3, 2, 1, 0, 0]] and pairs [1, 3], [1, 3], [2, 4], [6, 7]; what stands behind the
        last pair's position, here 4, no pair can see, and it is left out.

    Args:
        capacity: columns of a row, unless one solution needs more; those of the longest solution when None.
        multiple: a row's columns are a multiple of this.
        quality_weight: weight a pair by how much better gold's continuations end than the negative's; 1 otherwise.
        language: keep the whole solution and give `targets`.
    """
    solutions = [_lay_out(example, language) for example in examples]
    widths = [len(solution.ids) for solution in solutions]
    rows = fill_rows(widths, max(capacity or 0, *widths, 1))
    R, S = len(rows), -(-max(sum(widths[i] for i in row) for row in rows) // multiple) * multiple

    input_ids = torch.zeros(R, S, dtype=torch.long)
    start = torch.arange(S).repeat(R, 1)  # what fills a row up sees itself alone
    bound = start.clone()
    targets = torch.full((R, S), IGNORE_INDEX)
    pairs = [torch.empty(0)] * len(examples)
    for row, members in enumerate(rows):
        column = 0
        for index in members:
            solution, span = solutions[index], slice(column, column + widths[index])
            input_ids[row, span], targets[row, span] = solution.ids, solution.targets
            start[row, span], bound[row, span] = column, solution.bound + column
            pairs[index] = solution.pairs + row * S + column
            column = span.stop
    return VerifierBatch(
        input_ids=input_ids,
        start=start,
        bound=bound,
        pairs=torch.cat(pairs)[None],
        labels=torch.cat([_weights(example, quality_weight) for example in examples])[None],
        numbers=torch.cat([torch.arange(len(e.triplets)) + e.number for e in examples])[None],
        targets=targets if language else None,
    )


class _Solution(NamedTuple):
    """One example alone in a row, from column 0 on."""

    ids: torch.Tensor  # (S,) trunk, then branches
    bound: torch.Tensor  # (S,)
    targets: torch.Tensor  # (S,)
    pairs: torch.Tensor  # (M, 2)


def _lay_out(example: Example, language: bool) -> _Solution:
    end = len(example.ids) if language else max((t.position for t in example.triplets), default=0) + 1
    trunk = torch.tensor(example.ids[:end])
    branches = sorted({(t.position, t.negative) for t in example.triplets})
    column = {branch: end + offset for offset, branch in enumerate(branches)}
    positions, negatives = torch.tensor(branches, dtype=torch.long).view(-1, 2).unbind(-1)
    pairs = [(t.position, column[t.position, t.negative]) for t in example.triplets]
    targets = torch.full((end + len(branches),), IGNORE_INDEX)
    first = max(example.start, 1)  # the solution's first token; nothing foretells token 0
    if language:
        targets[first - 1 : end - 1] = trunk[first:]
    return _Solution(
        ids=torch.cat([trunk, negatives]),
        bound=torch.cat([torch.arange(end), positions]),
        targets=targets,
        pairs=torch.tensor(pairs, dtype=torch.long).view(-1, 2),
    )


def _weights(example: Example, quality: bool) -> torch.Tensor:
    """(M,) float32."""
    gaps = torch.tensor(example.gaps) if quality else torch.ones(len(example.triplets))
    return gaps.float().clamp(min=0)
