"""The sequential test: its posterior, the rollouts it requests, how often it errs."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import beta

from llm2.common.stats import probability_worse
from llm2.exploration.quality import (
    Fork,
    RolloutCounts,
    SequentialTest,
    StoppingRule,
    reused_rollouts,
)

RULE = StoppingRule(
    quality_margin=0.3, confidence=0.9, futility=0.03, gold_rollouts=8, min_rollouts=2, rollouts_step=1, max_rollouts=8
)
GOLD, OTHER = 7, 9
FORK = Fork(4, (GOLD, OTHER), (0.6, 0.4))


def test_the_probability_is_that_of_the_sampled_posteriors():
    gold, token = (beta.rvs(0.5 + h, 0.5 + 8 - h, size=200_000, random_state=h) for h in (5, 1))
    assert probability_worse(RolloutCounts(1, 8), RolloutCounts(5, 8), 0.1) == pytest.approx(
        (gold - token > 0.1).mean(), abs=0.005
    )


def test_the_probability_orders_as_it_should():
    assert probability_worse(RolloutCounts(0, 8), RolloutCounts(8, 8), 0.3) > 0.99
    assert probability_worse(RolloutCounts(8, 8), RolloutCounts(0, 8), 0.3) < 0.001
    assert probability_worse(RolloutCounts(0, 4), RolloutCounts(4, 8), 0.3) < probability_worse(
        RolloutCounts(0, 40), RolloutCounts(4, 8), 0.3
    )
    assert probability_worse(RolloutCounts(8, 8), RolloutCounts(8, 8), 0.3) < probability_worse(
        RolloutCounts(2, 2), RolloutCounts(8, 8), 0.3
    )


def run(test: SequentialTest, right) -> int:
    """Outcomes `right(token, index)` until the test is over; the number of rollouts."""
    return run_at(test, lambda position, token, index: right(token, index))


def run_at(test: SequentialTest, right) -> int:
    """The same with outcomes `right(position, token, index)`."""
    rollouts = 0
    while wanted := test.next_rollouts():
        for (position, token), indices in wanted.items():
            for index in indices:
                test.add(position, token, right(position, token, index))
                rollouts += 1
    assert test.progress == 1
    return rollouts


def test_progress_is_the_share_of_decided_tokens_with_gold_by_its_rollouts():
    test = SequentialTest([FORK, Fork(6, (1, 2), (0.5, 0.5))], RULE)
    assert test.progress == 0 and SequentialTest([], RULE).progress == 1
    test.add(4, GOLD, False, rollouts=4)  # half of gold_rollouts
    assert test.progress == 0.5 / 4
    test.add(4, GOLD, False, rollouts=40)
    assert test.progress == 1 / 4
    test.next_rollouts()  # the verdict: equal, since gold never succeeds
    assert test.progress == 2 / 4


def test_where_gold_never_succeeds_no_other_token_is_rolled_out():
    test = SequentialTest([FORK], RULE)
    assert run(test, lambda token, index: False) == RULE.gold_rollouts
    assert test.verdicts == {(4, OTHER): "equal"} and test.counts[4, OTHER] == RolloutCounts(0, 0)


def test_a_token_that_never_succeeds_is_a_negative_after_few_rollouts():
    test = SequentialTest([FORK], RULE)
    assert run(test, lambda token, index: token == GOLD) == RULE.gold_rollouts + 2
    assert test.verdicts == {(4, OTHER): "negative"} and test.counts[4, OTHER] == RolloutCounts(0, 2)


def test_where_both_always_succeed_the_token_is_equal_before_max_rollouts():
    test = SequentialTest([FORK], RULE)
    assert run(test, lambda token, index: True) < RULE.gold_rollouts + RULE.max_rollouts
    assert test.verdicts == {(4, OTHER): "equal"}


def test_an_undecided_token_stops_at_max_rollouts():
    test = SequentialTest([FORK], RULE)
    assert run(test, lambda token, index: token == GOLD or index % 3 < 2) == RULE.gold_rollouts + RULE.max_rollouts
    assert test.verdicts == {(4, OTHER): "undecided"}


def test_a_rollout_is_requested_once_whatever_is_reused():
    test = SequentialTest([FORK], RULE)
    test.add(4, GOLD, True, rollouts=3)
    test.add(4, OTHER, True)
    seen = []
    while wanted := test.next_rollouts():
        for (position, token), indices in wanted.items():
            seen += [(token, index) for index in indices]
            for index in indices:
                test.add(position, token, index % 2 == 0)
    assert len(seen) == len(set(seen)) and {i for t, i in seen if t == GOLD} == set(range(RULE.gold_rollouts - 3))


def test_only_the_first_fork_that_lacks_gold_rollouts_requests_them():
    test = SequentialTest([FORK, Fork(6, (1, 2), (0.5, 0.5))], RULE)
    assert test.next_rollouts() == {(4, GOLD): range(8)}
    for _ in range(8):
        test.add(4, GOLD, True)
        test.add(6, 1, True)  # reused
    assert test.next_rollouts() == {(4, OTHER): range(2), (6, 2): range(2)}


def test_errors_are_as_rare_as_the_rule_promises_where_its_prior_holds():
    """Qualities drawn from the prior: 3,000 tests, each verdict held against the true qualities."""
    random = np.random.default_rng(0)
    wrong, made = {"negative": 0, "equal": 0}, {"negative": 0, "equal": 0}
    for _ in range(3_000):
        gold, other = random.beta(0.5, 0.5, size=2)
        test = SequentialTest([FORK], RULE)
        run(test, lambda token, index, q={GOLD: gold, OTHER: other}: random.random() < q[token])
        verdict = test.verdicts[4, OTHER]
        if verdict in made:
            made[verdict] += 1
            wrong[verdict] += (gold - other > RULE.quality_margin) != (verdict == "negative")
    assert made["negative"] > 500 and made["equal"] > 500
    assert wrong["negative"] / made["negative"] < 1 - RULE.confidence
    assert 0 < wrong["equal"] / made["equal"] < RULE.futility


def test_a_rollout_of_gold_is_reused_at_later_forks_as_long_as_it_follows_gold():
    ids = [0, 0, 0, 0, GOLD, 11, 12, 13, 14]
    forks = [FORK, Fork(6, (12, 2), (0.5, 0.5)), Fork(7, (13, 3), (0.5, 0.5))]
    assert list(reused_rollouts(ids, 4, [11, 12, 13, 14], forks)) == [(6, 12), (7, 13)]
    # At 6 it takes another token, and leaves the gold solution.
    assert list(reused_rollouts(ids, 4, [11, 2, 13, 14], forks)) == [(6, 2)]
    assert list(reused_rollouts(ids, 4, [5, 12, 13, 14], forks)) == []  # it left gold before
    assert list(reused_rollouts(ids, 4, [11, 5, 13], forks)) == []  # a token that is no candidate
    assert list(reused_rollouts(ids, 4, [11], forks)) == []  # it ended before


SKIPPING = replace(RULE, skip_hopeless=True)
FORKS = [Fork(position, (GOLD, OTHER), (0.6, 0.4)) for position in range(20)]


@pytest.mark.parametrize("first", range(21))
def test_bisection_finds_the_first_fork_where_gold_succeeds(first):
    def right(position: int, token: int, index: int) -> bool:
        return position >= first and (token == GOLD or position % 2 == 0)

    test, whole = SequentialTest(FORKS, SKIPPING), SequentialTest(FORKS, RULE)
    rollouts, all_rollouts = run_at(test, right), run_at(whole, right)
    assert test.skipped_forks == first and [fork.position for fork in test.forks] == list(range(first, 20))
    assert test.verdicts == {key: verdict for key, verdict in whole.verdicts.items() if key[0] >= first}
    assert set(test.counts) == {(position, token) for position in range(first, 20) for token in (GOLD, OTHER)}
    probes = 0 if first == 0 else 1 + math.ceil(math.log2(20))
    assert rollouts <= all_rollouts - first * RULE.gold_rollouts + probes * test.few


def test_a_later_fork_where_gold_fails_is_given_up_after_few_rollouts():
    test = SequentialTest(FORKS, SKIPPING)
    run_at(test, lambda position, token, index: token == GOLD and position != 10)
    assert test.skipped_forks == 0 and test.few == 3
    assert test.counts[10, GOLD] == RolloutCounts(0, 3) and test.counts[10, OTHER] == RolloutCounts()
    assert [key[0] for key, verdict in test.verdicts.items() if verdict == "equal"] == [10]
    assert all(test.counts[position, GOLD].rollouts == 8 for position in range(20) if position != 10)


def test_no_rollout_of_gold_is_wasted_on_a_fork_that_others_pass():
    test = SequentialTest(FORKS, SKIPPING)
    test.add(0, GOLD, False, rollouts=4)
    test.add(10, GOLD, True, rollouts=8)  # as bisection's first
    assert test.next_rollouts() == {(5, GOLD): range(3)}


def test_hopeless_is_where_no_outcome_of_a_token_makes_it_a_negative():
    """The few rollouts are the fewest that rule a clearly worse token out; without the key all of gold's are made."""
    none = RolloutCounts()
    assert probability_worse(none, RolloutCounts(0, 3), 0.3) <= 0.03 < probability_worse(none, RolloutCounts(0, 2), 0.3)
    assert SequentialTest(FORKS, RULE).few == RULE.gold_rollouts
    assert SequentialTest(FORKS, replace(SKIPPING, gold_rollouts=1)).few == 1
