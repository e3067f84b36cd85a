"""Padding: which chunks share a rectangle, and which a forward."""

from llm2.decoding.forward_batch import LONG_CHUNK, MAX_BATCHED_TOKENS, MAX_GRAPH_CHUNK, Chunk, PaddedBatch, split
from llm2.decoding.kv_cache import SlotCache


def chunks(*lengths: int) -> list[Chunk]:
    return [Chunk(slot, 0, [0] * length) for slot, length in enumerate(lengths)]


def sizes(batch: PaddedBatch) -> list[tuple[int, int]]:
    return [(group.rows, group.length) for group in batch.groups]


def test_one_long_prompt_does_not_pad_the_others():
    batch = PaddedBatch(SlotCache(64), few_shapes=False)
    batch.add(chunks(*[150] * 20, 1_100, *[150] * 20))
    assert sizes(batch) == [(40, 150), (1, 1_100)] and len(batch.ids) == 7_100  # in one rectangle 45,100
    batch = PaddedBatch(SlotCache(64), few_shapes=False)
    lengths = [20, 1, 37, 64, 5, 90, 130, 33, 1, 400, 16, 70]
    batch.add(chunks(*lengths))
    assert sum(lengths) < len(batch.ids) < 1.5 * sum(lengths)


def test_forwards_that_are_captured_have_few_shapes():
    shapes = set()
    for rows in range(1, 33):
        for length in range(1, MAX_GRAPH_CHUNK + 1):
            batch = PaddedBatch(SlotCache(64), few_shapes=True)
            batch.add(chunks(*[length] * rows))
            shapes.add(batch.graph_key)
    assert {length for ((_, length, _),), *_ in shapes} == {1, 2, 4, 8, 16, 32, 64}
    assert {rows for ((rows, _, _),), *_ in shapes} == {1, 2, 4, 8, 16, 32} and len(shapes) == 42


def test_decoding_steps_are_kept_apart_from_prompts_and_prompts_from_too_many_others():
    given = chunks(1, 1, 3, LONG_CHUNK, LONG_CHUNK + 1, MAX_GRAPH_CHUNK, MAX_GRAPH_CHUNK + 1, 3_000, 5_000, 4_000, 1)
    verifier = chunks(2, 30, 900)
    parts = [[[len(chunk.ids) for chunk in of] for of in part] for part in split(given, verifier, few_shapes=True)]
    assert parts == [
        [[1, 1, 1, 3, 16], [2]],
        [[17, 64], [30]],
        [[65, 3_000, 4_000], []],
        [[5_000], [900]],
    ]
    together = split(given, verifier, few_shapes=False)
    assert [len(of) for of in together[0]] == [10, 0] and len(together) == 2
    assert all(sum(len(chunk.ids) for of in part for chunk in of) <= MAX_BATCHED_TOKENS for part in together)
