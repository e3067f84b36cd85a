"""Which prompts share a trunk."""

from llm2.decoding.prefix_cache import SHORTEST, Trunks, common_prefix

LONG = list(range(100, 100 + 3 * SHORTEST))


def test_common_prefix_counts_equal_first_tokens():
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == common_prefix([1, 2], [1, 2]) == 2
    assert common_prefix([], [1]) == common_prefix([2], [1]) == 0
    for length in range(40):
        assert common_prefix(LONG[:length] + [0], LONG) == min(length, len(LONG))


def test_samples_of_one_prompt_share_all_but_its_last_token():
    trunk, bound, rows = Trunks(8, 2).of([LONG], [5], 0, ahead=16)
    assert trunk.ids == LONG[:-1] and bound == len(LONG) - 1 and rows == 5


def test_prompts_that_begin_alike_share_what_they_have_in_common():
    trunks, prompts = Trunks(8, 2), [LONG, [*LONG[:40], 7, 8], [*LONG[:40], 9], [1, 2, 3]]
    first, _, rows = trunks.of(prompts, [1, 1, 1, 1], 0, ahead=16)
    assert rows == 3
    second, bound, _ = trunks.of(prompts, [1, 1, 1, 1], 1, ahead=16)
    assert second is first and bound == 40
    assert trunks.of(prompts, [1, 1, 1, 1], 3, ahead=16) is None


def test_little_in_common_and_single_rows_are_not_worth_a_trunk():
    assert Trunks(8, 2).of([LONG], [1], 0, ahead=16) is None
    assert Trunks(8, 2).of([LONG[: SHORTEST - 1]], [9], 0, ahead=16) is None
    assert Trunks(8, 2).of([LONG, [*LONG[: SHORTEST // 2], 1, 2]], [1, 1], 0, ahead=16) is None


def test_a_trunk_in_use_keeps_its_slot_and_an_unused_one_gives_it_up():
    trunks = Trunks(8, 1)
    first, _, _ = trunks.of([LONG], [4], 0, ahead=16)
    first.users = 4
    other = [token + 1000 for token in LONG]
    assert trunks.of([other], [4], 0, ahead=16) is None
    first.users = 0
    second, _, _ = trunks.of([other], [4], 0, ahead=16)
    assert second.slot == first.slot == 8 and second.ids == other[:-1]
