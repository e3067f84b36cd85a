"""Packed branches against each branch alone."""

import torch
from conftest import VOCABULARY
from reference import score

from llm2.batch import verifier_batch
from llm2.branches import branch
from llm2.loss import NO_PAIR
from llm2.triplets import Example, Triplet


def examples(count: int, seed: int = 0) -> list[Example]:
    """Solutions of unequal length with triplets at random positions, one of them doubled."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    made = []
    for _ in range(count):
        ids = [draw(3, VOCABULARY) for _ in range(draw(4, 20))]
        triplets = [Triplet(p, ids[p], draw(3, VOCABULARY)) for p in (draw(1, len(ids)) for _ in range(draw(1, 9)))]
        made.append(Example(ids, [*triplets, triplets[0]]))
    return made


def test_the_docstrings_example():
    example = Example([5, 6, 7], [Triplet(1, 6, 9), Triplet(1, 6, 9), Triplet(2, 7, 8)])
    branched, pairs, labels = verifier_batch([example])
    assert branched.input_ids.tolist() == [[5, 6, 7, 9, 8]]
    assert branched.position_ids.tolist() == [[0, 1, 2, 1, 2]]
    assert pairs.tolist() == [[[1, 3], [1, 3], [2, 4]]]
    assert labels.tolist() == [[1, 1, 1]]
    assert branched.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],  # 9 stands where 6 does: it sees 5 and itself
        [1, 1, 0, 0, 1],
    ]


def test_packed_scores_equal_each_branch_alone(verifier):
    batch = examples(9)
    branched, pairs, labels = verifier_batch(batch)
    with torch.inference_mode():
        output = verifier(branched.input_ids, branched.attention_mask, branched.position_ids, pairs=pairs)
    for row, example in enumerate(batch):
        for column, triplet in enumerate(example.triplets):
            prefix = example.ids[: triplet.position]
            expected = score(verifier, [*prefix, triplet.gold]) - score(verifier, [*prefix, triplet.negative])
            assert abs(output.margins[row, column].item() - expected) < 1e-4
        assert labels[row].tolist().count(1) == len(example.triplets)
        assert set(labels[row, len(example.triplets) :].tolist()) <= {NO_PAIR}


def test_branches_do_not_change_the_trunk(verifier):
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids, dtype=torch.bool)
    branched = branch(mask, ids, torch.randint(3, VOCABULARY, (2, 4)), torch.tensor([[0, 3, 9, 9], [1, 1, 8, 0]]))
    with torch.inference_mode():
        packed = verifier(branched.input_ids, branched.attention_mask, branched.position_ids).scores[:, :9]
        alone = verifier(ids).scores
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


def test_left_padding_changes_no_score(verifier):
    ids = torch.tensor([[7, 8, 9, 10]])
    padded = torch.tensor([[0, 0, 0, 7, 8, 9, 10]])
    mask = torch.tensor([[False] * 3 + [True] * 4])
    nothing = ids[:, :0]
    plain = branch(torch.ones_like(ids, dtype=torch.bool), ids, nothing, nothing)
    left = branch(mask, padded, nothing, nothing)
    with torch.inference_mode():
        expected = verifier(plain.input_ids, plain.attention_mask, plain.position_ids).scores
        found = verifier(left.input_ids, left.attention_mask, left.position_ids).scores
    torch.testing.assert_close(found[:, 3:], expected, atol=1e-5, rtol=0)
