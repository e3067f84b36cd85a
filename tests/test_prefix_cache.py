"""Which prompts share a prefix."""

from llm2.common.prefix import common_prefix
from llm2.decoding.prefix_cache import MIN_PREFIX_TOKENS, PrefixCache

LONG = list(range(100, 100 + 3 * MIN_PREFIX_TOKENS))


def test_common_prefix_counts_equal_first_tokens():
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == common_prefix([1, 2], [1, 2]) == 2
    assert common_prefix([], [1]) == common_prefix([2], [1]) == 0
    for length in range(40):
        assert common_prefix(LONG[:length] + [0], LONG) == min(length, len(LONG))


def test_samples_of_one_prompt_share_all_but_its_last_token():
    prefix, length, num_sharing = PrefixCache(8, 2).match([LONG], [5], 0, lookahead=16)
    assert prefix.token_ids == LONG[:-1] and length == len(LONG) - 1 and num_sharing == 5


def test_prompts_that_begin_alike_share_what_they_have_in_common():
    cache, prompts = PrefixCache(8, 2), [LONG, [*LONG[:40], 7, 8], [*LONG[:40], 9], [1, 2, 3]]
    first, _, num_sharing = cache.match(prompts, [1, 1, 1, 1], 0, lookahead=16)
    assert num_sharing == 3
    second, length, _ = cache.match(prompts, [1, 1, 1, 1], 1, lookahead=16)
    assert second is first and length == 40
    assert cache.match(prompts, [1, 1, 1, 1], 3, lookahead=16) is None


def test_short_prefixes_and_single_sequences_are_not_shared():
    assert PrefixCache(8, 2).match([LONG], [1], 0, lookahead=16) is None
    assert PrefixCache(8, 2).match([LONG[: MIN_PREFIX_TOKENS - 1]], [9], 0, lookahead=16) is None
    assert PrefixCache(8, 2).match([LONG, [*LONG[: MIN_PREFIX_TOKENS // 2], 1, 2]], [1, 1], 0, lookahead=16) is None


def test_a_prefix_in_use_keeps_its_slot_and_an_unused_one_is_evicted():
    cache = PrefixCache(8, 1)
    first, _, _ = cache.match([LONG], [4], 0, lookahead=16)
    first.ref_count = 4
    other = [token + 1000 for token in LONG]
    assert cache.match([other], [4], 0, lookahead=16) is None
    first.ref_count = 0
    second, _, _ = cache.match([other], [4], 0, lookahead=16)
    assert second.slot == first.slot == 8 and second.token_ids == other[:-1]
