"""Figures from graded samples, and how sure one may be of them.

Knows majority@k, pass@k, best of k, the weighted vote, 95 % intervals and paired tests. Leaves reading answers to
grading.py and tables to report/.
Everything is exact or seeded; the distributions and the resampling are scipy's.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import combinations

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
RESAMPLES = 9_999
BATCH = 500  # resamples held in memory at a time
SUBSETS = 1_000  # over which a weighted vote is averaged


@dataclass(frozen=True)
class PairedTest:
    """Two modes on the same problems: b (the newer) minus a (the baseline)."""

    difference: float  # mean of b - mean of a
    ci95: tuple[float, float]
    p: float  # two-sided
    test: str
    fixed: int  # problems on which b is better
    broken: int  # problems on which a is better
    detectable: float  # the smallest difference that these problems show with a power of 0.8


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; all of [0, 1] where nothing was observed."""
    if n == 0:
        return 0.0, 1.0
    interval = stats.binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def mean_intervals(values: np.ndarray, seed: int = 0) -> list[tuple[float, float]]:
    """95 % bootstrap intervals of the column means of per-problem fractions in [0, 1], such as majority@k.

    Args:
        values: (N, F), a row a problem and a column a figure; all columns are resampled alike.

    Where all of a column are equal (or alone), resampling shows no spread at all; Wilson's interval, the wider one,
    stands in.
    """
    values = np.asarray(values, dtype=float)  # (N, F)
    if len(values) == 1:
        return [wilson_interval(round(value), 1) for value in values[0]]
    low, high = bootstrap_means(values, seed).confidence_interval  # (F,) each
    return [
        wilson_interval(round(column.sum()), len(column)) if (column == column[0]).all() else (float(a), float(b))
        for column, a, b in zip(values.T, low, high, strict=True)
    ]


def bootstrap_means(values: np.ndarray, seed: int = 0):
    """scipy's percentile bootstrap of the column means of values (N, F); `bootstrap_distribution` is (F, RESAMPLES).

    Problems are drawn, not numbers: how often each was drawn, times the values, gives all columns by one product.
    """
    n = len(values)

    def means(drawn: np.ndarray, axis: int) -> np.ndarray:
        drawn = np.atleast_2d(drawn)  # (R, N), rows of the values
        offsets = n * np.arange(len(drawn))[:, None]
        times = np.bincount((drawn + offsets).ravel(), minlength=drawn.size).reshape(drawn.shape)  # (R, N)
        return values.T @ times.T / n  # (F, R)

    return stats.bootstrap(
        (np.arange(n),),
        means,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=BATCH,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=seed,
    )


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of the n samples, drawn without replacement, hold a correct one (Chen et al. 2021, eq. 1)."""
    _check_k(n, k)
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority_at_k(answers: Sequence[str | None], gold: str | None, k: int) -> float:
    """Chance that gold wins the vote of k of the answers, averaged over all subsets of size k; exact.

    Args:
        answers: canonical forms (`grading.extract_answer`), a vote each; None, an unreadable answer, has no vote.
        gold: the canonical gold answer.
        k: how many vote, at most len(answers).

    A tie between t answers counts 1/t. A vote of None alone is lost.
    """
    _check_k(len(answers), k)
    return majority_curve(answers, gold)[k - 1]


def majority_curve(answers: Sequence[str | None], gold: str | None) -> list[float]:
    """majority@k for k = 1 .. len(answers)."""
    votes = Counter(answers)
    blank, own = votes.pop(None, 0), votes.pop(gold, 0)
    return list(_chances_of_winning(own, tuple(sorted(votes.values())), blank))


@lru_cache(maxsize=100_000)
def _chances_of_winning(own: int, others: tuple[int, ...], blank: int) -> tuple[float, ...]:
    """For each k the share of k-subsets in which an answer with `own` votes wins against those of `others` votes each.

    Subsets are counted by how many votes they hold and how many answers tie: a polynomial sum, not an enumeration.
    """
    n = own + sum(others) + blank
    won = [Fraction(0)] * (n + 1)
    for best in range(1, own + 1):  # gold's votes in the subset: no other answer has more
        ways = Counter({(best, 1): math.comb(own, best)})  # (votes used, answers that tie) -> subsets
        for count in others:
            extended = Counter()
            for (used, tied), number in ways.items():
                for taken in range(min(count, best) + 1):
                    extended[used + taken, tied + (taken == best)] += number * math.comb(count, taken)
            ways = extended
        for (used, tied), number in ways.items():
            for silent in range(blank + 1):
                won[used + silent] += Fraction(number * math.comb(blank, silent), tied)
    return tuple(float(won[k] / math.comb(n, k)) for k in range(1, n + 1))


def best_of_k(scores: Sequence[float], correct: Sequence[bool], k: int) -> float:
    """Chance that the sample of the highest score among k is correct, averaged over all subsets of size k; exact.

    Samples of equal scores are as likely as each other to be taken.
    """
    n = len(scores)
    _check_k(n, k)
    right = Counter()
    for score, is_right in zip(scores, correct, strict=True):
        right[score] += bool(is_right)
    chance, below = 0.0, 0
    for score, count in sorted(Counter(scores).items()):
        wins = math.comb(below + count, k) - math.comb(below, k)  # subsets whose highest score is this one
        chance += wins * right[score] / count
        below += count
    return chance / math.comb(n, k)


def weighted_majority_at_k(
    answers: Sequence[str | None], weights: Sequence[float], gold: str | None, k: int, seed: int = 0
) -> float:
    """Chance that gold gets the largest sum of weights among k of the answers, averaged over subsets of size k.

    Over all subsets where there are at most SUBSETS of them, else over SUBSETS drawn ones: the same for every problem,
    so that a comparison of two modes is not blurred by the draw. Ties and None as in `majority_at_k`.
    """
    chosen = _subsets(len(answers), k, seed)  # (S, n)
    names = sorted({answer for answer in answers if answer is not None})
    if gold not in names:
        return 0.0
    votes = np.array(
        [[weight * (answer == name) for name in names] for answer, weight in zip(answers, weights, strict=True)]
    )
    sums = chosen @ votes  # (S, names)
    best = sums.max(axis=1, keepdims=True)
    winners = (sums >= best - 1e-12 * np.abs(best)) & (best > 0)
    return float((winners[:, names.index(gold)] / np.maximum(winners.sum(axis=1), 1)).mean())


@lru_cache(maxsize=64)
def _subsets(n: int, k: int, seed: int) -> np.ndarray:
    """Subsets of size k of n, a row of zeros and ones each, (S, n)."""
    _check_k(n, k)
    if math.comb(n, k) <= SUBSETS:
        return np.array([np.isin(np.arange(n), subset) for subset in combinations(range(n), k)], dtype=float)
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(n), (SUBSETS, 1)), axis=1)
    return (order < k).astype(float)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> PairedTest:
    """McNemar's exact test of two graded runs; the interval is the exact one given the number of flips."""
    a, b = _paired(a, b, bool)
    fixed, broken = int((b & ~a).sum()), int((a & ~b).sum())
    flips = fixed + broken
    if flips == 0:
        return PairedTest(0.0, (0.0, 0.0), 1.0, "McNemar exact", 0, 0, smallest_detectable_difference(len(a), 0.0))
    test = stats.binomtest(fixed, flips)
    share = test.proportion_ci(CONFIDENCE, method="exact")
    low, high = ((2 * bound - 1) * flips / len(a) for bound in (share.low, share.high))
    difference = (fixed - broken) / len(a)
    return PairedTest(
        difference=difference,
        ci95=(float(low), float(high)),
        p=float(test.pvalue),
        test="McNemar exact",
        fixed=fixed,
        broken=broken,
        detectable=smallest_detectable_difference(len(a), flips / len(a)),
    )


def paired_bootstrap(a: np.ndarray, b: np.ndarray, seed: int = 0) -> list[PairedTest]:
    """Paired bootstrap tests of per-problem figures a and b, (N, F) each: a test a column, drawn with both sides.

    Interval and p come from the same resamples, so that p < 0.05 where the interval leaves 0 out. With m of R resampled
    differences at or beyond 0, p is 2 (m + 1) / (R + 1), never 0 (Efron and Tibshirani 1993, chapter 15). Where only c
    problems changed, p is at least that of c throws of a coin, 2 / 2^c: resampling few problems says too much.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 2 or len(a) == 0:
        raise ValueError(f"expected two tables of one shape over the same problems, found {a.shape} and {b.shape}")
    difference = b - a  # (N, F)
    if len(a) == 1:
        difference = np.repeat(difference, 2, axis=0)  # the least that can be resampled; the coin's p speaks
    result = bootstrap_means(difference, seed)
    tests = []
    for column, drawn, low, high in zip(
        difference.T, result.bootstrap_distribution, *result.confidence_interval, strict=True
    ):
        beyond = min((drawn <= 0).sum(), (drawn >= 0).sum())
        fixed, broken = int((column[: len(a)] > 0).sum()), int((column[: len(a)] < 0).sum())
        tests.append(
            PairedTest(
                difference=float(column.mean()),
                ci95=(float(low), float(high)),
                p=min(1.0, max(2 * float(beyond + 1) / (RESAMPLES + 1), 2.0 ** (1 - fixed - broken))),
                test="paired bootstrap",
                fixed=fixed,
                broken=broken,
                detectable=smallest_detectable_mean(len(a), float(column.std())),
            )
        )
    return tests


def smallest_detectable_mean(n: int, deviation: float, power: float = 0.8, level: float = 0.05) -> float:
    """The mean difference, at most 1, that n paired problems show whose differences have this standard deviation.

    The deviation is taken as that of one changed problem at least: where none changed, its spread was not seen.
    """
    deviation = max(deviation, 1 / math.sqrt(n))
    return min(1.0, float(stats.norm.ppf(1 - level / 2) + stats.norm.ppf(power)) * deviation / math.sqrt(n))


def smallest_detectable_difference(n: int, flipped: float, power: float = 0.8, level: float = 0.05) -> float:
    """The difference in accuracy that n paired problems show with this power, in a two-sided test at this level.

    Args:
        n: problems.
        flipped: share of problems that the two modes grade differently (at least the difference itself).

    Normal approximation of McNemar's test (Connor 1987, eq. 3), solved for the difference; 1 where n is too small.
    """
    z_level, z_power = stats.norm.ppf(1 - level / 2), stats.norm.ppf(power)

    def shortfall(difference: float) -> float:
        share = max(flipped, difference)
        return z_level * math.sqrt(share) + z_power * math.sqrt(share - difference**2) - difference * math.sqrt(n)

    return 1.0 if shortfall(1.0) >= 0 else float(optimize.brentq(shortfall, 1e-12, 1.0))


def _paired(a: Sequence, b: Sequence, kind: type) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=kind), np.asarray(b, dtype=kind)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"expected two vectors of one length over the same problems, found {a.shape} and {b.shape}")
    return a, b


def _check_k(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must be 1 to {n}, the number of samples, found {k}")
