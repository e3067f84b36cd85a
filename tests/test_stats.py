"""Metrics and tests against numbers derived by hand, an enumeration of all subsets, and scipy."""

import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from llm2.common.stats import (
    best_of_k,
    majority_curve,
    mcnemar,
    mean_intervals,
    paired_bootstrap,
    pass_at_k,
    smallest_detectable_difference,
    smallest_detectable_mean,
    weighted_majority_at_k,
    wilson_interval,
)


def test_wilson_interval():
    # p = 1/2, n = 10, z^2 = 3.8415: (0.5 + 0.19207 -+ 1.96 * sqrt(0.025 + 0.0096036)) / 1.38415
    assert wilson_interval(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.38415 / 1.38415), abs=1e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_the_interval_of_equal_values_is_not_a_point():
    assert mean_intervals([[1.0, 0.0]] * 10) == [wilson_interval(10, 10), wilson_interval(0, 10)]
    assert mean_intervals([[1.0]]) == [wilson_interval(1, 1)]


def test_mean_intervals_agree_with_the_normal_ones_on_many_values():
    values = np.random.default_rng(0).random((2000, 3)) ** [1, 2, 3]
    half = 1.96 * values.std(axis=0, ddof=1) / 2000**0.5
    expected = np.stack([values.mean(axis=0) - half, values.mean(axis=0) + half], axis=1)
    assert np.array(mean_intervals(values)) == pytest.approx(expected, abs=0.001)
    assert mean_intervals(values) == mean_intervals(values)


def test_a_column_is_resampled_as_if_it_were_alone():
    values = np.random.default_rng(0).random((50, 2))
    alone = mean_intervals(values[:, 1:])[0]
    assert mean_intervals(values)[1] == pytest.approx(alone)  # a product of another shape may round otherwise


@pytest.mark.parametrize(
    ("n", "correct", "k", "expected"),
    [(4, 1, 2, 1 / 2), (5, 2, 3, 9 / 10), (20, 0, 20, 0), (20, 1, 20, 1), (20, 7, 1, 7 / 20), (3, 2, 2, 1)],
)
def test_pass_at_k(n, correct, k, expected):
    assert pass_at_k(n, correct, k) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answers", "k", "expected"),
    [
        (["7", "7", "3"], 1, 2 / 3),
        (["7", "7", "3"], 2, 2 / 3),  # {7,7} wins, twice {7,3} ties: (1 + 1/2 + 1/2) / 3
        (["7", "7", "3"], 3, 1),
        (["7", "3"], 2, 1 / 2),
        (["7", "3", "4"], 3, 1 / 3),
        (["7", None, None], 3, 1),  # an unreadable answer has no vote
        (["7", None, None], 2, 2 / 3),  # {None, None} is lost
        ([None, None], 2, 0),
        (["3", "4"], 1, 0),
        (["7", "7", "3", "3", "3"], 5, 0),
    ],
)
def test_majority_of_some_of_the_answers(answers, k, expected):
    assert majority_curve(answers, "7")[k - 1] == pytest.approx(expected)


def test_majority_equals_the_vote_of_every_subset():
    rng = random.Random(0)
    for _ in range(60):
        answers = rng.choices(["7", "3", "4", "5", None], k=rng.randrange(1, 9))
        for k in range(1, len(answers) + 1):
            subsets = list(combinations(answers, k))
            expected = sum(vote(subset) for subset in subsets) / len(subsets)
            assert majority_curve(answers, "7")[k - 1] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scores", "correct", "k", "expected"),
    [
        ([3, 2, 1], [True, False, False], 1, 1 / 3),
        ([3, 2, 1], [True, False, False], 2, 2 / 3),  # in {2, 1} alone it is not
        ([3, 2, 1], [False, True, False], 2, 1 / 3),
        ([3, 2, 1], [True, False, False], 3, 1),
        ([1, 1, 1], [True, False, False], 2, 1 / 3),  # equal scores are taken by lot
    ],
)
def test_best_of_k(scores, correct, k, expected):
    assert best_of_k(scores, correct, k) == pytest.approx(expected)


def test_best_of_k_equals_the_best_of_every_subset():
    rng = random.Random(0)
    for _ in range(40):
        n = rng.randrange(1, 8)
        scores, correct = rng.choices([0, 1, 2, 3], k=n), rng.choices([True, False], k=n)
        for k in range(1, n + 1):
            subsets = list(combinations(range(n), k))
            expected = sum(best(subset, scores, correct) for subset in subsets) / len(subsets)
            assert best_of_k(scores, correct, k) == pytest.approx(expected)


def best(subset, scores, correct) -> float:
    top = [i for i in subset if scores[i] == max(scores[j] for j in subset)]
    return sum(correct[i] for i in top) / len(top)


@pytest.mark.parametrize(
    ("weights", "k", "expected"),
    [
        ([1, 1, 1], 3, 1),  # as an unweighted vote: 7 has two of three
        ([1, 1, 3], 3, 0),
        ([1, 1, 2], 3, 1 / 2),
        ([1, 1, 1.5], 2, 1 / 3),  # {7,7} wins, twice {7,3} loses
    ],
)
def test_weighted_vote(weights, k, expected):
    assert weighted_majority_at_k(["7", "7", "3"], weights, "7", k) == pytest.approx(expected)


def test_an_unreadable_answer_has_no_weight():
    assert weighted_majority_at_k(["7", None, None], [1, 9, 9], "7", 3) == 1
    assert weighted_majority_at_k(["7", None], [1, 9], "7", 1) == 1 / 2
    assert weighted_majority_at_k([None, "3"], [1, 1], "7", 1) == 0


def test_equal_weights_vote_as_the_majority_does():
    answers = ["7"] * 5 + ["3"] * 4 + ["4"] * 2 + [None]
    for k in (1, 2, 6, 12):  # 924 subsets of six: all of them
        assert weighted_majority_at_k(answers, [0.5] * 12, "7", k) == pytest.approx(majority_curve(answers, "7")[k - 1])
    many = answers * 2  # 2.7 million subsets of twelve: some of them
    assert weighted_majority_at_k(many, [1] * 24, "7", 12) == pytest.approx(majority_curve(many, "7")[12 - 1], abs=0.04)


def vote(answers) -> float:
    counts = Counter(answer for answer in answers if answer is not None)
    winners = [answer for answer, count in counts.items() if count == max(counts.values())]
    return ("7" in winners) / max(1, len(winners))


def test_majority_does_not_depend_on_the_order_of_the_answers():
    answers = ["7"] * 6 + ["3"] * 7 + ["4"] * 5 + [None] * 2
    shuffled = random.Random(0).sample(answers, len(answers))
    assert majority_curve(answers, "7") == majority_curve(shuffled, "7")


def test_majority_without_gold_is_lost_even_where_no_answer_is_readable():
    assert majority_curve([None, None], None) == [0, 0]


@pytest.mark.parametrize("k", [0, 4])
def test_k_beyond_the_samples_is_refused(k):
    with pytest.raises(ValueError, match="1 to 3"):
        best_of_k([1.0, 2.0, 3.0], [True, False, True], k)
    with pytest.raises(ValueError, match="1 to 3"):
        pass_at_k(3, 1, k)


def test_mcnemar():
    a = [False] * 8 + [True] * 2 + [True] * 10
    b = [True] * 8 + [False] * 2 + [True] * 10
    test = mcnemar(a, b)
    assert (test.fixed, test.broken, test.difference) == (8, 2, pytest.approx(6 / 20))
    assert test.p == pytest.approx(2 * (1 + 10 + 45) / 1024)  # both tails of a fair coin thrown 10 times
    assert test.ci95[0] < 0 < test.difference < test.ci95[1]
    assert mcnemar(b, a).difference == -test.difference


def test_mcnemar_without_flips():
    test = mcnemar([True, False], [True, False])
    assert (test.difference, test.p, test.fixed, test.broken) == (0, 1, 0, 0)


def column(*values) -> np.ndarray:
    return np.array(values, dtype=float)[:, None]


def test_paired_bootstrap_of_few_changes_has_at_least_the_p_of_coin_tosses():
    (test,) = paired_bootstrap(column(0, 0, 0), column(1, 1, 1))
    assert test.p == pytest.approx(2 / 8)  # of 8 throws of three coins two are as extreme
    assert (test.difference, test.ci95, test.fixed, test.broken) == (1, (1, 1), 3, 0)
    (one,) = paired_bootstrap(column(0), column(1))
    assert (one.p, one.fixed, one.broken) == (1, 1, 0)


def test_paired_bootstrap_is_seeded_and_its_p_is_never_zero():
    a, b = np.zeros((200, 1)), np.linspace(0.1, 1, 200)[:, None]
    (test,) = paired_bootstrap(a, b)
    assert [test] == paired_bootstrap(a, b)
    assert test.p == pytest.approx(2 / 10_000)
    assert test.difference == pytest.approx(0.55)
    assert test.ci95[0] < 0.55 < test.ci95[1]


def test_paired_bootstrap_agrees_with_the_t_test_on_many_problems():
    rng = np.random.default_rng(0)
    a, b = rng.random((800, 3)), rng.random((800, 3)) + [0, 0.02, 0.04]
    for test, p in zip(paired_bootstrap(a, b), stats.ttest_rel(b, a).pvalue, strict=True):
        assert test.p == pytest.approx(p, abs=0.03)
        assert (test.p < 0.05) == (test.ci95[0] > 0 or test.ci95[1] < 0)


def test_equal_modes_do_not_differ():
    (test,) = paired_bootstrap(column(0.5, 0.2), column(0.5, 0.2))
    assert (test.difference, test.ci95, test.p, test.detectable) == (0, (0, 0), 1, 1)


def test_paired_tests_refuse_different_problems():
    with pytest.raises(ValueError, match="same problems"):
        mcnemar([True], [True, False])
    with pytest.raises(ValueError, match="same problems"):
        paired_bootstrap(column(1), column(1, 2))


def test_smallest_detectable_mean():
    assert smallest_detectable_mean(100, 0.5) == pytest.approx((1.959964 + 0.841621) * 0.05, abs=1e-6)
    assert smallest_detectable_mean(1, 0.5) == 1.0
    assert smallest_detectable_mean(100, 0.0) == pytest.approx(0.02801585, abs=1e-6)  # one of a hundred changed


def test_smallest_detectable_difference():
    # a power of one half leaves z * sqrt(flipped / n) = 1.95996 * 0.5 / 30
    assert smallest_detectable_difference(900, 0.25, power=0.5) == pytest.approx(0.0326661, abs=1e-6)
    assert smallest_detectable_difference(4000, 0.2) < smallest_detectable_difference(1000, 0.2)
    assert smallest_detectable_difference(2, 0.2) == 1.0
