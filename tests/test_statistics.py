"""Numbers derived by hand stand in the tests; majority@k has all subsets, enumerated, as its slow twin."""

import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from llm2.statistics import (
    majority_at_k,
    mcnemar,
    mean_interval,
    paired_permutation,
    pass_at_k,
    smallest_detectable_difference,
    wilson_interval,
)


def test_wilson_interval():
    # p = 1/2, n = 10, z^2 = 3.8415: (0.5 + 0.19207 -+ 1.96 * sqrt(0.025 + 0.0096036)) / 1.38415
    assert wilson_interval(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.38415 / 1.38415), abs=1e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_mean_interval_of_equal_values_is_not_a_point():
    assert mean_interval([1.0] * 10) == wilson_interval(10, 10)


def test_mean_interval_agrees_with_the_normal_one_on_many_values():
    values = np.random.default_rng(0).random(2000)
    half = 1.96 * values.std(ddof=1) / 2000**0.5
    assert mean_interval(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.001)
    assert mean_interval(values) == mean_interval(values)


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
def test_majority_at_k(answers, k, expected):
    assert majority_at_k(answers, "7", k) == pytest.approx(expected)


def test_majority_equals_the_vote_of_every_subset():
    rng = random.Random(0)
    for _ in range(60):
        answers = rng.choices(["7", "3", "4", "5", None], k=rng.randrange(1, 9))
        for k in range(1, len(answers) + 1):
            subsets = list(combinations(answers, k))
            expected = sum(vote(subset) for subset in subsets) / len(subsets)
            assert majority_at_k(answers, "7", k) == pytest.approx(expected)


def vote(answers) -> float:
    counts = Counter(answer for answer in answers if answer is not None)
    winners = [answer for answer, count in counts.items() if count == max(counts.values())]
    return ("7" in winners) / max(1, len(winners))


def test_majority_does_not_depend_on_the_order_of_the_answers():
    answers = ["7"] * 6 + ["3"] * 7 + ["4"] * 5 + [None] * 2
    shuffled = random.Random(0).sample(answers, len(answers))
    assert [majority_at_k(answers, "7", k) for k in range(1, 21)] == [
        majority_at_k(shuffled, "7", k) for k in range(1, 21)
    ]


def test_majority_without_gold_is_lost_even_where_no_answer_is_readable():
    assert majority_at_k([None, None], None, 1) == 0


@pytest.mark.parametrize("k", [0, 4])
def test_k_beyond_the_samples_is_refused(k):
    with pytest.raises(ValueError, match="1 to 3"):
        majority_at_k(["7", "7", "3"], "7", k)
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


def test_paired_permutation_is_exact_on_few_problems():
    test = paired_permutation([0, 0, 0], [1, 1, 1])
    assert test.p == pytest.approx(2 / 8)  # of 8 sign patterns two are as extreme
    assert (test.difference, test.ci95, test.fixed, test.broken) == (1, (1, 1), 3, 0)


def test_paired_permutation_is_seeded_and_its_p_is_never_zero():
    a, b = np.zeros(200), np.linspace(0.1, 1, 200)
    test = paired_permutation(a, b)
    assert test == paired_permutation(a, b)
    assert test.p == pytest.approx(2 / 10_000)
    assert test.difference == pytest.approx(0.55)
    assert test.ci95[0] < 0.55 < test.ci95[1]


def test_equal_modes_do_not_differ():
    test = paired_permutation([0.5, 0.2], [0.5, 0.2])
    assert (test.difference, test.ci95, test.p) == (0, (0, 0), 1)


def test_paired_tests_refuse_different_problems():
    with pytest.raises(ValueError, match="same problems"):
        mcnemar([True], [True, False])


def test_smallest_detectable_difference():
    # a power of one half leaves z * sqrt(flipped / n) = 1.95996 * 0.5 / 30
    assert smallest_detectable_difference(900, 0.25, power=0.5) == pytest.approx(0.0326661, abs=1e-6)
    assert smallest_detectable_difference(4000, 0.2) < smallest_detectable_difference(1000, 0.2)
    assert smallest_detectable_difference(2, 0.2) == 1.0
