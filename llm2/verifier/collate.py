"""Collate examples into the batch of one verifier forward: packed rows of solutions with negatives as branches.

Letters: R rows, S columns, M pairs of the batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from llm2.verifier.loss import IGNORE_INDEX
from llm2.verifier.steps import ABSENT
from llm2.verifier.triplets import Example


class VerifierBatch(NamedTuple):
    """The arguments of ProcessVerifier.forward, and the other keys of `pair_tensors`, for loss and metrics."""

    input_ids: torch.Tensor | None  # (R, S); None if frozen states replace the forward of the backbone
    start: torch.Tensor | None  # (R, S) first column of the token's solution
    prefix_len: torch.Tensor | None  # (R, S) tokens from there on that it sees, without itself; also its position id
    pair_indices: torch.Tensor  # (1, M, 2) of gold and negative in the flattened R * S tokens; without branches (1, M)
    # of the last tokens of their prefixes
    pair_tokens: torch.Tensor  # (1, M, 2) ids of gold and negative; ABSENT beside a step's last token
    pair_weights: torch.Tensor  # (1, M) float32
    pair_ids: torch.Tensor  # (1, M) number of the triplet in its file
    pair_targets: torch.Tensor  # (1, M) float32 probability that gold is better
    pair_offsets: torch.Tensor  # (1, M) float32 System 1's margin for the loss of guided margins, else 0
    targets: torch.Tensor | None = None  # (R, S) the next token of the solution, or IGNORE_INDEX; for the LM loss
    states: torch.Tensor | None = None  # (N, D), replace the backbone's; pair_indices index its rows


def verifier_batch(
    examples: Sequence[Example],
    *,
    branches: bool = True,
    capacity: int | None = None,
    multiple: int = 1,
    quality_weight: bool = False,
    lm_targets: bool = False,
) -> VerifierBatch:
    """Lay out solutions and all their pairs.

    Triplets with the same position and negative share a branch and stay separate pairs. Example:

        solutions of ids [5, 6, 7, 4] and [3, 2] with the triplets [1, 6, 9], [1, 6, 9], [2, 7, 8] and [1, 2, 1] give
        input_ids [[5, 6, 7, 9, 8], [3, 2, 1, 0, 0]] and pair_indices [1, 3], [1, 3], [2, 4], [6, 7]. The 4 is left
        out, since no pair sees tokens after the last pair's position. Without branches input_ids are
        [[5, 6], [3, 0]] and pair_indices 0, 0, 1, 2.

    Args:
        branches: False for a verifier that reads prefixes only (`score: prefix`).
        capacity: columns of a row, exceeded only by a longer solution; the longest solution's length when None.
        multiple: S is a multiple of this.
        quality_weight: weight a pair by gold's quality less the negative's; 1 otherwise.
        lm_targets: keep whole solutions and give `targets`.
    """
    layouts = [_lay_out(example, branches, lm_targets) for example in examples]
    widths = [len(layout.ids) for layout in layouts]
    rows = pack_rows(widths, max(capacity or 0, *widths, 1))
    R, S = len(rows), -(-max(sum(widths[i] for i in row) for row in rows) // multiple) * multiple

    input_ids = torch.zeros(R, S, dtype=torch.long)
    start = torch.arange(S).repeat(R, 1)  # padding sees only itself
    prefix_len = torch.zeros(R, S, dtype=torch.long)
    targets = torch.full((R, S), IGNORE_INDEX)
    pair_indices = [torch.empty(0)] * len(examples)
    for row, members in enumerate(rows):
        column = 0
        for index in members:
            layout, span = layouts[index], slice(column, column + widths[index])
            input_ids[row, span], targets[row, span] = layout.ids, layout.targets
            start[row, span], prefix_len[row, span] = column, layout.prefix_len
            pair_indices[index] = layout.pair_indices + row * S + column
            column = span.stop
    return VerifierBatch(
        input_ids=input_ids,
        start=start,
        prefix_len=prefix_len,
        pair_indices=torch.cat(pair_indices)[None],
        targets=targets if lm_targets else None,
        **pair_tensors(examples, quality_weight),
    )


def pair_tensors(examples: Sequence[Example], quality_weight: bool = False) -> dict[str, torch.Tensor]:
    """pair_tokens, pair_weights, pair_ids, pair_targets and pair_offsets of a VerifierBatch."""
    weights = [torch.tensor(e.quality_gaps if quality_weight else [1.0] * len(e.triplets)) for e in examples]
    pair_targets = [torch.tensor(e.gold_better or [1.0] * len(e.triplets)) for e in examples]
    offsets = [torch.tensor(e.system1_margins or [0.0] * len(e.triplets)) for e in examples]
    tokens = [[triplet.gold, triplet.negative] for e in examples for triplet in e.triplets]
    return {
        "pair_tokens": torch.tensor(tokens, dtype=torch.long).view(1, -1, 2),
        "pair_weights": torch.cat(weights).clamp(min=0)[None],
        "pair_ids": torch.cat([torch.arange(len(e.triplets)) + e.first_pair_id for e in examples])[None],
        "pair_targets": torch.cat(pair_targets)[None],
        "pair_offsets": torch.cat(offsets)[None],
    }


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: indices of the items in each row, at most `capacity` long.

    An item longer than that gets a row to itself.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, left in enumerate(room) if left >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


class _Layout(NamedTuple):
    """One solution, from column 0 on: the trunk, then the branches (T tokens)."""

    ids: torch.Tensor  # (T,)
    prefix_len: torch.Tensor  # (T,)
    targets: torch.Tensor  # (T,)
    pair_indices: torch.Tensor  # (M, 2), or (M,) without branches


def _lay_out(example: Example, with_branches: bool, lm_targets: bool) -> _Layout:
    last = max((t.position for t in example.triplets), default=0)
    trunk_len = len(example.ids) if lm_targets else max(last + with_branches, 1)
    trunk = torch.tensor(example.ids[:trunk_len])
    negatives = {(t.position, t.negative) for t in example.triplets if t.negative != ABSENT}
    branches = sorted(negatives) if with_branches else []
    column = {branch: trunk_len + offset for offset, branch in enumerate(branches)}
    positions, negatives = torch.tensor(branches, dtype=torch.long).view(-1, 2).unbind(-1)
    if with_branches:
        pairs = [(t.position, column.get((t.position, t.negative), t.position)) for t in example.triplets]
        pair_indices = torch.tensor(pairs, dtype=torch.long).view(-1, 2)
    else:
        pair_indices = torch.tensor([t.position - 1 for t in example.triplets], dtype=torch.long)
    targets = torch.full((trunk_len + len(branches),), IGNORE_INDEX)
    if lm_targets:
        first = max(example.start, 1)  # token 0 has no prefix to be predicted from
        targets[first - 1 : trunk_len - 1] = trunk[first:]
    return _Layout(
        ids=torch.cat([trunk, negatives]),
        prefix_len=torch.cat([torch.arange(trunk_len), positions]),
        targets=targets,
        pair_indices=pair_indices,
    )
