"""Packed rows and branches against each token alone."""

import pytest
import torch
from conftest import VOCABULARY, tiny_verifier
from reference import score
from torch.nn.attention.flex_attention import create_block_mask

from llm2.verifier.collate import VerifierBatch, pack_rows, verifier_batch
from llm2.verifier.loss import IGNORE_INDEX
from llm2.verifier.masks import BLOCK, packed_block_mask, packed_mask
from llm2.verifier.model import ProcessVerifier, VerifierOutput
from llm2.verifier.triplets import Example, Triplet

SMALL = [
    Example([5, 6, 7, 4], [Triplet(1, 6, 9), Triplet(1, 6, 9), Triplet(2, 7, 8)], start=1, first_pair_id=10),
    Example([3, 2], [Triplet(1, 2, 1)], start=1, first_pair_id=20),
]


def examples(count: int, seed: int = 0) -> list[Example]:
    """Solutions of unequal length with triplets at random positions, one of them doubled."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    made, pairs = [], 0
    for _ in range(count):
        ids = [draw(3, VOCABULARY) for _ in range(draw(4, 20))]
        triplets = [Triplet(p, ids[p], draw(3, VOCABULARY)) for p in (draw(1, len(ids)) for _ in range(draw(1, 9)))]
        made.append(
            Example(
                ids, [*triplets, triplets[0]], start=2, first_pair_id=pairs, quality_gaps=[0.5] * (len(triplets) + 1)
            )
        )
        pairs += len(triplets) + 1
    return made


def model_inputs(batch: VerifierBatch) -> dict[str, torch.Tensor]:
    """Those of its tensors that a forward without LM targets takes."""
    names = ("input_ids", "start", "prefix_len", "pair_indices", "pair_tokens")
    return {name: getattr(batch, name) for name in names}


def scored(verifier: ProcessVerifier, batch: VerifierBatch) -> VerifierOutput:
    with torch.inference_mode():
        return verifier(**model_inputs(batch))


def test_the_docstrings_example():
    batch = verifier_batch(SMALL)
    assert batch.input_ids.tolist() == [[5, 6, 7, 9, 8], [3, 2, 1, 0, 0]]
    assert batch.prefix_len.tolist() == [[0, 1, 2, 1, 2], [0, 1, 1, 0, 0]]
    assert batch.pair_indices.tolist() == [[[1, 3], [1, 3], [2, 4], [6, 7]]]
    assert batch.pair_weights.tolist() == [[1, 1, 1, 1]] and batch.pair_ids.tolist() == [[10, 11, 12, 20]]
    assert batch.targets is None


def test_solutions_share_a_row_without_seeing_each_other():
    batch = verifier_batch(SMALL, capacity=8)
    assert batch.input_ids.tolist() == [[5, 6, 7, 9, 8, 3, 2, 1]]
    assert packed_mask(batch.start, batch.prefix_len)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 0, 0],  # 9 has the position of 6: it sees 5 and itself
        [1, 1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 0, 1],
    ]


def test_targets_are_the_tokens_of_the_solution():
    batch = verifier_batch(SMALL, lm_targets=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 4, 9, 8], [3, 2, 1, 0, 0, 0]]
    _ = IGNORE_INDEX
    assert batch.targets.tolist() == [[6, 7, 4, _, _, _], [2, _, _, _, _, _]]


def test_the_weight_of_a_pair_is_its_quality_gap():
    weighted = SMALL[0]._replace(quality_gaps=[1.0, 0.25, -0.5])
    assert verifier_batch([weighted], quality_weight=True).pair_weights.tolist() == [[1.0, 0.25, 0.0]]
    assert verifier_batch([weighted]).pair_weights.tolist() == [[1.0, 1.0, 1.0]]


def test_rows_are_packed_first_fit_the_longest_first():
    assert pack_rows([3, 9, 4, 1, 12], 10) == [[4], [1, 3], [2, 0]]
    assert pack_rows([], 10) == []


@pytest.mark.parametrize("capacity, multiple, rows", [(None, 1, None), (10**6, 1, 1), (64, 128, None), (1, 1, 9)])
def test_packed_scores_equal_each_branch_alone(verifier, capacity, multiple, rows):
    solutions = examples(9)
    if capacity == 1:  # each solution a row of its own
        batches = [verifier_batch([solution]) for solution in solutions]
        margins = torch.cat([scored(verifier, batch).margins for batch in batches], dim=-1)
        pair_ids = torch.cat([batch.pair_ids for batch in batches], dim=-1)
    else:
        batch = verifier_batch(solutions, capacity=capacity, multiple=multiple)
        assert batch.input_ids.shape[1] % multiple == 0 and rows in (None, len(batch.input_ids))
        margins, pair_ids = scored(verifier, batch).margins, batch.pair_ids
    found = dict(zip(pair_ids[0].tolist(), margins[0].tolist(), strict=True))
    assert len(found) == sum(len(example.triplets) for example in solutions)
    for example in solutions:
        for pair_id, triplet in enumerate(example.triplets, start=example.first_pair_id):
            prefix = example.ids[: triplet.position]
            expected = score(verifier, [*prefix, triplet.gold]) - score(verifier, [*prefix, triplet.negative])
            assert abs(found[pair_id] - expected) < 1e-4


def test_branches_and_other_solutions_do_not_change_a_solutions_scores(verifier):
    first, second, _ = examples(3)
    batch = verifier_batch([first, second], capacity=10**6, lm_targets=True)
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
    (R, S), dense = batch.start.shape, packed_mask(batch.start, batch.prefix_len)
    assert R == 2 and S == 5 * BLOCK
    found = packed_block_mask(batch.start, batch.prefix_len)
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


@pytest.mark.one_in(2)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("autocast", [False, True])
def test_flex_attention_gives_the_same_scores(tmp_path, monkeypatch, autocast):
    """On a CPU torch runs FlexAttention forward alone, and uncompiled: enough to show that the block mask is used.

    Under autocast rotary embeddings return float32 beside values in bfloat16, which not every torch takes."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations.flex_attention import WrappedFlexAttention

    dtypes = set()

    def watched(query, key, value, **options):
        dtypes.add((query.dtype, key.dtype, value.dtype))
        return flex_attention(query, key, value, **options)

    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda self: watched)
    verifier, flex = flex_twin(tmp_path)
    batch = long_rows()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, found = scored(verifier, batch), scored(flex, batch)
    scale = expected.margins.abs().max().item()
    torch.testing.assert_close(found.margins, expected.margins, atol=0.02 * scale if autocast else 1e-4, rtol=0)
    assert dtypes == {(torch.bfloat16 if autocast else torch.float32,) * 3}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's backward pass wants a CUDA GPU")
def test_flex_attention_gives_the_same_gradients_on_a_gpu(tmp_path):
    gradients = []
    batch = long_rows()
    for verifier in flex_twin(tmp_path):
        verifier.cuda().train()
        verifier(**{name: tensor.cuda() for name, tensor in model_inputs(batch).items()}).margins.sum().backward()
        gradients.append({name: parameter.grad for name, parameter in verifier.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-3, rtol=1e-2, msg=name)
