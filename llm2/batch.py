"""Examples -> the padded batch of one verifier forward: negatives ride as branches behind their gold solution.

Letters: B solutions, T tokens of the longest, P distinct branches of the busiest, M pairs of the busiest.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from llm2.branches import sees
from llm2.loss import NO_PAIR
from llm2.triplets import Example


class VerifierBatch(NamedTuple):
    """T trunk columns, then P branches."""

    input_ids: torch.Tensor  # (B, T + P)
    position_ids: torch.Tensor  # (B, T + P)
    attention_mask: torch.Tensor  # (B, 1, T + P, T + P) booleans
    pairs: torch.Tensor  # (B, M, 2) the columns of gold and negative
    labels: torch.Tensor  # (B, M) 1 for a pair, NO_PAIR for what only fills the rectangle


def verifier_batch(examples: Sequence[Example]) -> VerifierBatch:
    """Lay out B solutions and all their pairs.

    Two triplets with the same position and negative share a branch and stay two pairs. Example:

        one solution of ids [5, 6, 7] with the triplets [1, 6, 9], [1, 6, 9], [2, 7, 8] gives
        input_ids [5, 6, 7, 9, 8], position_ids [0, 1, 2, 1, 2] and pairs [1, 3], [1, 3], [2, 4].
    """
    branches = [sorted({(t.position, t.negative) for t in example.triplets}) for example in examples]
    trunk = _pad([example.ids for example in examples])  # (B, T)
    negatives = _pad([[negative for _, negative in own] for own in branches])  # (B, P)
    slots = _pad([[position for position, _ in own] for own in branches])  # (B, P)
    (B, T), P = trunk.shape, negatives.shape[1]
    pairs = []
    for example, own in zip(examples, branches, strict=True):
        column = {branch: T + index for index, branch in enumerate(own)}
        pairs.append(torch.tensor([[t.position, column[t.position, t.negative]] for t in example.triplets]).view(-1, 2))
    own = torch.arange(T + P).expand(B, -1)
    bound = torch.cat([own[:, :T], slots], dim=-1)
    return VerifierBatch(
        input_ids=torch.cat([trunk, negatives], dim=-1),
        position_ids=bound,
        attention_mask=sees(own, bound, T + P),
        pairs=pad_sequence(pairs, batch_first=True),
        labels=pad_sequence([torch.ones(len(p), dtype=torch.long) for p in pairs], True, NO_PAIR),
    )


def _pad(rows: list[list[int]]) -> torch.Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
