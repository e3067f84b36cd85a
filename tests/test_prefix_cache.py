"""Which prompts share a prefix."""

from llm2.common.prefix import common_prefix
from llm2.decoding.prefix_cache import MIN_PREFIX_TOKENS, PrefixCache
from llm2.decoding.sampling import Prompt

LONG = list(range(100, 100 + 3 * MIN_PREFIX_TOKENS))


def match(cache: PrefixCache, ids: list[int], samples: int, *following: list[int]):
    return cache.match(prompt(ids, samples), [prompt(other, 1) for other in following], lookahead=16)


def prompt(ids: list[int], samples: int) -> Prompt:
    return Prompt(0, ids, range(samples))


def test_common_prefix_counts_equal_first_tokens():
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == common_prefix([1, 2], [1, 2]) == 2
    assert common_prefix([], [1]) == common_prefix([2], [1]) == 0
    for length in range(40):
        assert common_prefix(LONG[:length] + [0], LONG) == min(length, len(LONG))


def test_samples_of_one_prompt_share_all_but_its_last_token():
    prefix, length, num_sharing = match(PrefixCache(8, 2), LONG, 5)
    assert prefix.token_ids == LONG[:-1] and length == len(LONG) - 1 and num_sharing == 5


def test_prompts_that_begin_alike_share_what_they_have_in_common():
    cache, prompts = PrefixCache(8, 2), [LONG, [*LONG[:40], 7, 8], [*LONG[:40], 9], [1, 2, 3]]
    first, _, num_sharing = match(cache, *prompts[:1], 1, *prompts[1:])
    assert num_sharing == 3
    second, length, _ = match(cache, prompts[1], 1, *prompts[2:])
    assert second is first and length == 40
    assert match(cache, prompts[3], 1) is None


def test_short_prefixes_and_single_sequences_are_not_shared():
    assert match(PrefixCache(8, 2), LONG, 1) is None
    assert match(PrefixCache(8, 2), LONG[: MIN_PREFIX_TOKENS - 1], 9) is None
    assert match(PrefixCache(8, 2), LONG, 1, [*LONG[: MIN_PREFIX_TOKENS // 2], 1, 2]) is None


def test_a_longer_prompt_of_several_sequences_continues_its_prefix_and_others_leave_it_as_it_is():
    cache = PrefixCache(8, 2)
    first, length, _ = match(cache, LONG[:30], 2)
    assert length == len(first.token_ids) == 29
    assert match(cache, LONG, 1)[:2] == (first, 29) and match(cache, [*LONG[:25], 7, 8], 2)[:2] == (first, 25)
    assert len(first.token_ids) == 29
    assert match(cache, LONG, 2)[:2] == (first, len(LONG) - 1) and first.token_ids == LONG[:-1]


def test_the_prefix_without_readers_that_was_matched_longest_ago_makes_room():
    cache, others = PrefixCache(8, 2), [[token + 1000 * i for token in LONG] for i in range(3)]
    first, second = (match(cache, other, 2)[0] for other in others[:2])
    assert match(cache, others[0], 2)[0] is first
    assert match(cache, others[2], 2)[0].slot == second.slot
    assert match(cache, others[0], 2)[0] is first


def test_a_prefix_in_use_keeps_its_slot_and_an_unused_one_is_evicted():
    cache = PrefixCache(8, 1)
    first, _, _ = match(cache, LONG, 4)
    first.ref_count = 4
    other = [token + 1000 for token in LONG]
    assert match(cache, other, 4) is None
    first.ref_count = 0
    second, _, _ = match(cache, other, 4)
    assert second.slot == first.slot == 8 and second.token_ids == other[:-1]
