"""The sequential test: its posterior, what it asks for, how often it errs."""

import numpy as np
import pytest
from scipy.stats import beta

from llm2.exploration.quality import (
    Fork,
    RolloutCounts,
    SequentialTest,
    StoppingRule,
    probability_worse,
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


def run(trial: SequentialTest, right) -> int:
    """Answer what the trial asks for; `right(token, index)` is an outcome. Returns the rollouts."""
    rollouts = 0
    while asks := trial.ask():
        for (position, token), indices in asks.items():
            for index in indices:
                trial.add(position, token, right(token, index))
                rollouts += 1
    return rollouts


def test_where_gold_never_gets_there_no_other_token_is_rolled_out():
    trial = SequentialTest([FORK], RULE)
    assert run(trial, lambda token, index: False) == RULE.gold_rollouts
    assert trial.verdicts == {(4, OTHER): "equal"} and trial.tallies[4, OTHER] == RolloutCounts(0, 0)


def test_a_token_that_never_gets_there_is_a_negative_after_few_rollouts():
    trial = SequentialTest([FORK], RULE)
    assert run(trial, lambda token, index: token == GOLD) == RULE.gold_rollouts + 2
    assert trial.verdicts == {(4, OTHER): "negative"} and trial.tallies[4, OTHER] == RolloutCounts(0, 2)


def test_where_both_always_get_there_the_token_is_equal_before_the_cap():
    trial = SequentialTest([FORK], RULE)
    assert run(trial, lambda token, index: True) < RULE.gold_rollouts + RULE.max_rollouts
    assert trial.verdicts == {(4, OTHER): "equal"}


def test_at_the_cap_a_token_is_given_up_and_not_called_equal():
    trial = SequentialTest([FORK], RULE)
    assert run(trial, lambda token, index: token == GOLD or index % 3 < 2) == RULE.gold_rollouts + RULE.max_rollouts
    assert trial.verdicts == {(4, OTHER): "undecided"}


def test_an_index_is_asked_for_once_whatever_passes_by():
    trial = SequentialTest([FORK], RULE)
    trial.add(4, GOLD, True, rollouts=3)
    trial.add(4, OTHER, True)
    seen = []
    while asks := trial.ask():
        for (position, token), indices in asks.items():
            seen += [(token, index) for index in indices]
            for index in indices:
                trial.add(position, token, index % 2 == 0)
    assert len(seen) == len(set(seen)) and {i for t, i in seen if t == GOLD} == set(range(RULE.gold_rollouts - 3))


def test_of_the_forks_that_lack_gold_rollouts_only_the_first_asks():
    trial = SequentialTest([FORK, Fork(6, (1, 2), (0.5, 0.5))], RULE)
    assert trial.ask() == {(4, GOLD): range(8)}
    for _ in range(8):
        trial.add(4, GOLD, True)
        trial.add(6, 1, True)  # they all passed by there
    assert trial.ask() == {(4, OTHER): range(2), (6, 2): range(2)}


def test_errors_are_as_rare_as_the_rule_promises_where_its_prior_holds():
    """Qualities drawn from the prior: 3,000 tests, each verdict held against the true qualities."""
    random = np.random.default_rng(0)
    wrong, made = {"negative": 0, "equal": 0}, {"negative": 0, "equal": 0}
    for _ in range(3_000):
        gold, other = random.beta(0.5, 0.5, size=2)
        trial = SequentialTest([FORK], RULE)
        run(trial, lambda token, index, q={GOLD: gold, OTHER: other}: random.random() < q[token])
        verdict = trial.verdicts[4, OTHER]
        if verdict in made:
            made[verdict] += 1
            wrong[verdict] += (gold - other > RULE.quality_margin) != (verdict == "negative")
    assert made["negative"] > 500 and made["equal"] > 500
    assert wrong["negative"] / made["negative"] < 1 - RULE.confidence
    assert 0 < wrong["equal"] / made["equal"] < RULE.futility


def test_a_rollout_of_gold_passes_by_later_forks_as_long_as_it_follows_gold():
    ids = [0, 0, 0, 0, GOLD, 11, 12, 13, 14]
    forks = [FORK, Fork(6, (12, 2), (0.5, 0.5)), Fork(7, (13, 3), (0.5, 0.5))]
    assert list(reused_rollouts(ids, 4, [11, 12, 13, 14], forks)) == [(6, 12), (7, 13)]
    assert list(reused_rollouts(ids, 4, [11, 2, 13, 14], forks)) == [
        (6, 2)
    ]  # there it takes another token, and is gone
    assert list(reused_rollouts(ids, 4, [5, 12, 13, 14], forks)) == []  # it left gold before
    assert list(reused_rollouts(ids, 4, [11, 5, 13], forks)) == []  # a token that is no candidate
    assert list(reused_rollouts(ids, 4, [11], forks)) == []  # it ended before
