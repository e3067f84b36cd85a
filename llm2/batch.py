"""Examples -> the padded batch of one verifier forward: negatives ride as branches behind their gold solution.

Letters: B solutions, T tokens of the longest, P distinct branches of the busiest, M pairs of the busiest.
"""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from llm2.branches import Branched, branch
from llm2.loss import NO_PAIR
from llm2.triplets import Example


def verifier_batch(examples: Sequence[Example]) -> tuple[Branched, torch.Tensor, torch.Tensor]:
    """Lay out B solutions and all their pairs.

    Two triplets with the same position and negative share a branch and stay two pairs. Example:

        one solution of ids [5, 6, 7] with the triplets [1, 6, 9], [1, 6, 9], [2, 7, 8] gives
        input_ids [5, 6, 7, 9, 8], position_ids [0, 1, 2, 1, 2] and pairs [1, 3], [1, 3], [2, 4].

    Returns:
        the branched input of T + P columns; pairs (B, M, 2), the columns of gold and negative; labels (B, M), 1 for a
        pair and NO_PAIR for what only fills the rectangle.
    """
    branches = [sorted({(t.position, t.negative) for t in example.triplets}) for example in examples]
    T = max(len(example.ids) for example in examples)
    pairs = []
    for example, own in zip(examples, branches, strict=True):
        column = {key: T + index for index, key in enumerate(own)}
        pairs.append(torch.tensor([[t.position, column[t.position, t.negative]] for t in example.triplets]).view(-1, 2))

    ids = _pad([example.ids for example in examples])
    mask = _pad([[1] * len(example.ids) for example in examples]).bool()
    slots = _pad([[position for position, _ in own] for own in branches])
    negatives = _pad([[negative for _, negative in own] for own in branches])
    labels = pad_sequence([torch.ones(len(p), dtype=torch.long) for p in pairs], True, NO_PAIR)
    return branch(mask, ids, negatives, slots), pad_sequence(pairs, True, 0), labels


def _pad(rows: list[list[int]]) -> torch.Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
