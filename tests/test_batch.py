"""Packed rows and branches against each token alone."""

import pytest
import torch
from conftest import VOCABULARY, tiny_verifier
from reference import score
from torch.nn.attention.flex_attention import create_block_mask

from llm2.verifier.collate import VerifierBatch, verifier_batch
from llm2.verifier.loss import IGNORE_INDEX
from llm2.verifier.model import ProcessVerifier, VerifierOutput
from llm2.verifier.packing import BLOCK, fill_rows, row_block_mask, row_mask
from llm2.verifier.triplets import Example, Triplet

SMALL = [
    Example([5, 6, 7, 4], [Triplet(1, 6, 9), Triplet(1, 6, 9), Triplet(2, 7, 8)], start=1, number=10),
    Example([3, 2], [Triplet(1, 2, 1)], start=1, number=20),
]


def examples(count: int, seed: int = 0) -> list[Example]:
    """Solutions of unequal length with triplets at random positions, one of them doubled."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    made, number = [], 0
    for _ in range(count):
        ids = [draw(3, VOCABULARY) for _ in range(draw(4, 20))]
        triplets = [Triplet(p, ids[p], draw(3, VOCABULARY)) for p in (draw(1, len(ids)) for _ in range(draw(1, 9)))]
        made.append(Example(ids, [*triplets, triplets[0]], start=2, number=number, gaps=[0.5] * (len(triplets) + 1)))
        number += len(triplets) + 1
    return made


def scored(verifier: ProcessVerifier, batch: VerifierBatch) -> VerifierOutput:
    with torch.inference_mode():
        return verifier(batch.input_ids, start=batch.start, bound=batch.bound, pairs=batch.pairs)


def test_the_docstrings_example():
    batch = verifier_batch(SMALL)
    assert batch.input_ids.tolist() == [[5, 6, 7, 9, 8], [3, 2, 1, 0, 0]]
    assert (batch.bound - batch.start).tolist() == [[0, 1, 2, 1, 2], [0, 1, 1, 0, 0]]
    assert batch.pairs.tolist() == [[[1, 3], [1, 3], [2, 4], [6, 7]]]
    assert batch.labels.tolist() == [[1, 1, 1, 1]] and batch.numbers.tolist() == [[10, 11, 12, 20]]
    assert batch.targets is None


def test_solutions_share_a_row_without_seeing_each_other():
    batch = verifier_batch(SMALL, capacity=8)
    assert batch.input_ids.tolist() == [[5, 6, 7, 9, 8, 3, 2, 1]]
    assert row_mask(batch.start, batch.bound)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 0, 0],  # 9 stands where 6 does: it sees 5 and itself
        [1, 1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 0, 1],
    ]


def test_targets_are_the_tokens_of_the_solution():
    batch = verifier_batch(SMALL, language=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 4, 9, 8], [3, 2, 1, 0, 0, 0]]
    _ = IGNORE_INDEX
    assert batch.targets.tolist() == [[6, 7, 4, _, _, _], [2, _, _, _, _, _]]


def test_a_pair_weighs_as_much_as_gold_is_better():
    weighted = SMALL[0]._replace(gaps=[1.0, 0.25, -0.5])
    assert verifier_batch([weighted], quality_weight=True).labels.tolist() == [[1.0, 0.25, 0.0]]
    assert verifier_batch([weighted]).labels.tolist() == [[1.0, 1.0, 1.0]]


def test_rows_are_filled_first_fit_the_longest_first():
    assert fill_rows([3, 9, 4, 1, 12], 10) == [[4], [1, 3], [2, 0]]
    assert fill_rows([], 10) == []


@pytest.mark.parametrize("capacity, multiple, rows", [(None, 1, None), (10**6, 1, 1), (64, 128, None), (1, 1, 9)])
def test_packed_scores_equal_each_branch_alone(verifier, capacity, multiple, rows):
    solutions = examples(9)
    if capacity == 1:  # each solution a row of its own
        batches = [verifier_batch([solution]) for solution in solutions]
        margins = torch.cat([scored(verifier, batch).margins for batch in batches], dim=-1)
        numbers = torch.cat([batch.numbers for batch in batches], dim=-1)
    else:
        batch = verifier_batch(solutions, capacity=capacity, multiple=multiple)
        assert batch.input_ids.shape[1] % multiple == 0 and rows in (None, len(batch.input_ids))
        margins, numbers = scored(verifier, batch).margins, batch.numbers
    found = dict(zip(numbers[0].tolist(), margins[0].tolist(), strict=True))
    assert len(found) == sum(len(example.triplets) for example in solutions)
    for example in solutions:
        for offset, triplet in enumerate(example.triplets):
            prefix = example.ids[: triplet.position]
            expected = score(verifier, [*prefix, triplet.gold]) - score(verifier, [*prefix, triplet.negative])
            assert abs(found[example.number + offset] - expected) < 1e-4


def test_branches_and_neighbours_do_not_change_the_trunk(verifier):
    first, second, _ = examples(3)
    batch = verifier_batch([first, second], capacity=10**6, language=True)
    packed = scored(verifier, batch).scores[0]
    for example in (first, second):
        column = next(
            c for c in range(len(packed)) if batch.input_ids[0, c:].tolist()[: len(example.ids)] == example.ids
        )
        with torch.inference_mode():
            alone = verifier(torch.tensor([example.ids])).scores[0]
        torch.testing.assert_close(packed[column : column + len(example.ids)], alone, atol=1e-5, rtol=0)


def test_a_solution_without_pairs_takes_part_in_a_forward(verifier):
    output = scored(verifier, verifier_batch([Example([0], [])]))
    assert output.margins.shape == (1, 0) and output.scores.shape == (1, 1)


def test_the_eager_attention_gives_the_same_scores(verifier, tmp_path):
    verifier.save_pretrained(tmp_path)
    eager = ProcessVerifier.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert eager.backbone.config._attn_implementation == "eager"
    batch = verifier_batch(examples(3))
    expected, found = scored(verifier, batch).scores, scored(eager, batch).scores
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def long_rows() -> VerifierBatch:
    """Two rows of several blocks; solutions and branches cross the borders of blocks."""
    made = []
    for length, positions in (
        (300, range(1, 300, 7)),
        (90, (1, 5, 89)),
        (260, (130, 131, 259)),
        (400, range(390, 400)),
    ):
        made.append(Example(list(range(length)), [Triplet(p, p, 1000) for p in positions]))
    return verifier_batch(made, capacity=640, multiple=BLOCK)


def test_the_block_mask_is_the_dense_mask():
    batch = long_rows()
    (R, S), dense = batch.bound.shape, row_mask(batch.start, batch.bound)
    assert R == 2 and S == 5 * BLOCK
    found = row_block_mask(batch.start, batch.bound)
    row, query, key = torch.arange(R)[:, None, None], torch.arange(S)[:, None], torch.arange(S)
    assert torch.equal(found.mask_mod(row, 0, query, key), dense[:, 0])
    expected = create_block_mask(found.mask_mod, R, None, S, S, device="cpu", BLOCK_SIZE=BLOCK)
    assert torch.equal(found.to_dense(), expected.to_dense())
    counts = (found.full_kv_num_blocks, expected.full_kv_num_blocks)
    assert torch.equal(*counts) and counts[0].sum() > 0
    assert found.sparsity() > 50, "most blocks are skipped"


def flex_twin(folder, **changes) -> tuple[ProcessVerifier, ProcessVerifier]:
    """The same weights with SDPA and with FlexAttention; heads of 16, the least that FlexAttention takes."""
    verifier = tiny_verifier(folder / "system1", hidden_size=64, vocab_size=1024, **changes)
    verifier.save_pretrained(folder / "verifier")
    return verifier, ProcessVerifier.from_pretrained(folder / "verifier", attn_implementation="flex_attention").eval()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_the_same_scores(tmp_path, monkeypatch):
    """On a CPU torch runs FlexAttention forward alone, and uncompiled: enough to see that the block mask arrives."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations.flex_attention import WrappedFlexAttention

    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda self: flex_attention)
    verifier, flex = flex_twin(tmp_path)
    batch = long_rows()
    expected, found = scored(verifier, batch), scored(flex, batch)
    torch.testing.assert_close(found.margins, expected.margins, atol=1e-4, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's backward pass wants a CUDA GPU")
def test_flex_attention_gives_the_same_gradients_on_a_gpu(tmp_path):
    gradients = []
    batch = long_rows()
    for verifier in flex_twin(tmp_path):
        verifier.cuda().train()
        tensors = {name: getattr(batch, name).cuda() for name in ("input_ids", "start", "bound", "pairs")}
        verifier(**tensors).margins.sum().backward()
        gradients.append({name: parameter.grad for name, parameter in verifier.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-3, rtol=1e-2, msg=name)
