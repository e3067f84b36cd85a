"""Packed branches against each branch alone."""

import torch
from conftest import VOCABULARY
from reference import score

from llm2.batch import verifier_batch
from llm2.branches import mask_for
from llm2.loss import NO_PAIR
from llm2.triplets import Example, Triplet
from llm2.verifier import ProcessVerifier


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
    batch = verifier_batch([example])
    assert batch.input_ids.tolist() == [[5, 6, 7, 9, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 1, 2]]
    assert batch.pairs.tolist() == [[[1, 3], [1, 3], [2, 4]]]
    assert batch.labels.tolist() == [[1, 1, 1]]
    assert batch.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],  # 9 stands where 6 does: it sees 5 and itself
        [1, 1, 0, 0, 1],
    ]


def test_packed_scores_equal_each_branch_alone(verifier):
    solutions = examples(9)
    batch = verifier_batch(solutions)
    with torch.inference_mode():
        output = verifier(batch.input_ids, batch.attention_mask, batch.position_ids, pairs=batch.pairs)
    for row, example in enumerate(solutions):
        for column, triplet in enumerate(example.triplets):
            prefix = example.ids[: triplet.position]
            expected = score(verifier, [*prefix, triplet.gold]) - score(verifier, [*prefix, triplet.negative])
            assert abs(output.margins[row, column].item() - expected) < 1e-4
        assert batch.labels[row].tolist().count(1) == len(example.triplets)
        assert set(batch.labels[row, len(example.triplets) :].tolist()) <= {NO_PAIR}


def test_branches_do_not_change_the_trunk(verifier):
    (example,) = examples(1)
    batch = verifier_batch([example])
    with torch.inference_mode():
        packed = verifier(batch.input_ids, batch.attention_mask, batch.position_ids).scores
        alone = verifier(torch.tensor([example.ids])).scores
    torch.testing.assert_close(packed[:, : len(example.ids)], alone, atol=1e-5, rtol=0)


def test_the_eager_attention_gives_the_same_scores(verifier, tmp_path):
    verifier.save_pretrained(tmp_path)
    eager = ProcessVerifier.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert eager.backbone.config._attn_implementation == "eager"
    batch = verifier_batch(examples(3))
    with torch.inference_mode():
        expected = verifier(batch.input_ids, batch.attention_mask, batch.position_ids).scores
        found = eager(batch.input_ids, mask_for(eager, batch.attention_mask), batch.position_ids).scores
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
