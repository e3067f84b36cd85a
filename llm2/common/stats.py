"""Metrics of graded samples, their 95 % intervals, and paired tests: pure functions, exact or seeded.

majority@k, pass@k, best of k and the weighted vote are means over all subsets of k samples.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from itertools import combinations

import numpy as np
from scipy import optimize, stats
from scipy.special import betainc

CONFIDENCE = 0.95
RESAMPLES = 9_999
BATCH = 500  # resamples in memory at a time
JEFFREYS = 0.5  # both parameters of the prior of a share
CELLS = 400  # of the integral over a share
SUBSETS = 1_000  # limit of subsets for a weighted vote


@dataclass(frozen=True)
class PairedTest:
    """Two modes on the same problems: b (the newer) minus a (the baseline)."""

    difference: float  # mean of b - mean of a
    ci95: tuple[float, float]
    p: float  # two-sided
    test: str
    fixed: int  # problems on which b is better
    broken: int  # problems on which a is better
    detectable: float  # smallest difference that this n detects with a power of 0.8


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; [0, 1] for n = 0."""
    if n == 0:
        return 0.0, 1.0
    interval = stats.binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def mean_intervals(values: np.ndarray, seed: int = 0) -> list[tuple[float, float]]:
    """95 % bootstrap intervals of the column means of per-problem fractions in [0, 1], such as majority@k.

    Args:
        values: (N, F): N problems, F metrics; all columns use the same resamples.

    A column of equal values has no spread under resampling, so it gets Wilson's interval, which is wider.
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

    Resamples problem indices: one matrix product of how often each was drawn with the values gives all columns.
    """
    n = len(values)

    def means(indices: np.ndarray, axis: int) -> np.ndarray:
        indices = np.atleast_2d(indices)  # (R, N)
        offsets = n * np.arange(len(indices))[:, None]
        counts = np.bincount((indices + offsets).ravel(), minlength=indices.size).reshape(indices.shape)  # (R, N)
        return values.T @ counts.T / n  # (F, R)

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


def bootstrap_p(resampled: np.ndarray) -> float:
    """Two-sided p of resampled means against 0: with m of R at or beyond it 2 (m + 1) / (R + 1), never 0.

    Efron and Tibshirani 1993, chapter 15.
    """
    beyond = min((resampled <= 0).sum(), (resampled >= 0).sum())
    return min(1.0, 2 * float(beyond + 1) / (len(resampled) + 1))


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, include a correct one (Chen et al. 2021, eq. 1)."""
    _check_k(n, k)
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority_curve(answers: Sequence[str | None], gold: str | None) -> list[float]:
    """majority@k for k = 1 .. len(answers): the probability that gold wins a vote of k, over all subsets of size k.

    Args:
        answers: canonical answers (`grading.extract_answer`); None (unreadable) has no vote.
        gold: the canonical gold answer.

    A tie of t answers counts 1/t. A subset with only None counts 0.
    """
    votes = Counter(answers)
    blank, gold_votes = votes.pop(None, 0), votes.pop(gold, 0)
    return list(_win_probabilities(gold_votes, tuple(sorted(votes.values())), blank))


@lru_cache(maxsize=100_000)
def _win_probabilities(gold: int, others: tuple[int, ...], blank: int) -> tuple[float, ...]:
    """For each k the share of k-subsets in which gold wins, given the vote counts of gold and of the other answers.

    Counts subsets by votes held and answers tied: a polynomial sum instead of an enumeration.
    """
    n = gold + sum(others) + blank
    won = [Fraction(0)] * (n + 1)  # subsets that gold wins, by size
    for best in range(1, gold + 1):  # gold's votes in the subset: no other answer has more
        subsets = Counter({(best, 1): math.comb(gold, best)})  # (votes held, answers tied) -> number of subsets
        for votes in others:
            extended = Counter()
            for (held, tied), number in subsets.items():
                for taken in range(min(votes, best) + 1):
                    extended[held + taken, tied + (taken == best)] += number * math.comb(votes, taken)
            subsets = extended
        for (held, tied), number in subsets.items():
            for taken in range(blank + 1):
                won[held + taken] += Fraction(number * math.comb(blank, taken), tied)
    return tuple(float(won[k] / math.comb(n, k)) for k in range(1, n + 1))


def best_of_k(scores: Sequence[float], correct: Sequence[bool], k: int) -> float:
    """Probability that the sample with the highest score of k is correct: the exact mean over all subsets of size k.

    Ties are broken at random.
    """
    n = len(scores)
    _check_k(n, k)
    num_correct = Counter(score for score, is_correct in zip(scores, correct, strict=True) if is_correct)
    won, below = 0.0, 0
    for score, count in sorted(Counter(scores).items()):
        subsets = math.comb(below + count, k) - math.comb(below, k)  # those whose highest score is this one
        won += subsets * num_correct[score] / count
        below += count
    return won / math.comb(n, k)


def vote_weights(scores: Sequence[float]) -> list[float]:
    """exp(score): the loss makes scores log-odds of one solution beating another (Bradley and Terry, 1952)."""
    return np.exp(np.array(scores) - max(scores)).tolist()


def weighted_majority_at_k(
    answers: Sequence[str | None], weights: Sequence[float], gold: str | None, k: int, seed: int = 0
) -> float:
    """Probability that gold gets the largest sum of weights among k of the answers, a mean over subsets of size k.

    Over all subsets if there are at most SUBSETS, else over SUBSETS random ones, the same for every problem, so that
    sampling adds no noise to a comparison of two modes. Ties and None as in `majority_curve`.
    """
    subsets = _subsets(len(answers), k, seed)  # (S, n)
    distinct = sorted({answer for answer in answers if answer is not None})
    if gold not in distinct:
        return 0.0
    votes = np.array(
        [[weight * (answer == other) for other in distinct] for answer, weight in zip(answers, weights, strict=True)]
    )  # (n, A)
    sums = subsets @ votes  # (S, A)
    best = sums.max(axis=1, keepdims=True)
    winners = (sums >= best - 1e-12 * np.abs(best)) & (best > 0)
    return float((winners[:, distinct.index(gold)] / np.maximum(winners.sum(axis=1), 1)).mean())


@lru_cache(maxsize=64)
def _subsets(n: int, k: int, seed: int) -> np.ndarray:
    """Subsets of size k of n samples as rows of zeros and ones, (S, n)."""
    _check_k(n, k)
    if math.comb(n, k) <= SUBSETS:
        return np.array([np.isin(np.arange(n), subset) for subset in combinations(range(n), k)], dtype=float)
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(n), (SUBSETS, 1)), axis=1)
    return (order < k).astype(float)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> PairedTest:
    """McNemar's exact test of two graded runs; the interval is exact given the number of flips."""
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    _check_paired(a, b, dimensions=1)
    fixed, broken = int((b & ~a).sum()), int((a & ~b).sum())
    flips = fixed + broken
    if flips == 0:
        return PairedTest(0.0, (0.0, 0.0), 1.0, "McNemar exact", 0, 0, smallest_detectable_difference(len(a), 0.0))
    test = stats.binomtest(fixed, flips)
    share = test.proportion_ci(CONFIDENCE, method="exact")
    low, high = ((2 * bound - 1) * flips / len(a) for bound in (share.low, share.high))
    return PairedTest(
        difference=(fixed - broken) / len(a),
        ci95=(float(low), float(high)),
        p=float(test.pvalue),
        test="McNemar exact",
        fixed=fixed,
        broken=broken,
        detectable=smallest_detectable_difference(len(a), flips / len(a)),
    )


def paired_bootstrap(a: np.ndarray, b: np.ndarray, seed: int = 0) -> list[PairedTest]:
    """Two-sided paired bootstrap tests of per-problem metrics a and b, (N, F) each: one test per column.

    Interval and p come from the same resamples, so that p < 0.05 where the interval excludes 0. Where only c problems
    changed, p is at least that of c coin tosses, 2 / 2^c, since the bootstrap is too optimistic for few changes.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    _check_paired(a, b, dimensions=2)
    difference = b - a  # (N, F)
    if len(a) == 1:
        difference = np.repeat(difference, 2, axis=0)  # scipy resamples two at least; the coin's p decides
    result = bootstrap_means(difference, seed)
    tests = []
    for column, resampled, low, high in zip(
        difference.T, result.bootstrap_distribution, *result.confidence_interval, strict=True
    ):
        fixed, broken = int((column[: len(a)] > 0).sum()), int((column[: len(a)] < 0).sum())
        tests.append(
            PairedTest(
                difference=float(column.mean()),
                ci95=(float(low), float(high)),
                p=min(1.0, max(bootstrap_p(resampled), 2.0 ** (1 - fixed - broken))),
                test="paired bootstrap",
                fixed=fixed,
                broken=broken,
                detectable=smallest_detectable_mean(len(a), float(column.std())),
            )
        )
    return tests


def smallest_detectable_mean(n: int, deviation: float, power: float = 0.8, level: float = 0.05) -> float:
    """The smallest mean difference that a test of n paired problems detects with this power, at most 1.

    Args:
        deviation: standard deviation of the differences; at least that of a single changed problem is assumed, since
            where none changed the spread was not observed.
    """
    deviation = max(deviation, 1 / math.sqrt(n))
    return min(1.0, float(stats.norm.ppf(1 - level / 2) + stats.norm.ppf(power)) * deviation / math.sqrt(n))


def smallest_detectable_difference(n: int, flipped: float, power: float = 0.8, level: float = 0.05) -> float:
    """The smallest difference in accuracy that a two-sided test of n paired problems detects with this power.

    Args:
        flipped: share of problems that the two modes grade differently (at least the difference itself).

    Normal approximation of McNemar's test (Connor 1987, eq. 3), solved for the difference; 1 where n is too small.
    """
    z_level, z_power = stats.norm.ppf(1 - level / 2), stats.norm.ppf(power)

    def shortfall(difference: float) -> float:
        share = max(flipped, difference)
        return z_level * math.sqrt(share) + z_power * math.sqrt(share - difference**2) - difference * math.sqrt(n)

    return 1.0 if shortfall(1.0) >= 0 else float(optimize.brentq(shortfall, 1e-12, 1.0))


def _check_paired(a: np.ndarray, b: np.ndarray, dimensions: int) -> None:
    if a.shape != b.shape or a.ndim != dimensions or len(a) == 0:
        raise ValueError(f"expected two arrays of one shape over the same problems, found {a.shape} and {b.shape}")


def _check_k(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must be 1 to {n}, the number of samples, found {k}")


@cache
def probability_worse(counts: tuple[int, int], other: tuple[int, int], margin: float = 0.0) -> float:
    """P(other's share - this one's > margin), each share with its posterior under the Jeffreys prior Beta(1/2, 1/2).

    Args:
        counts, other: successes and trials.

    Integrates the other's posterior times this one's distribution function at `margin` below, cell by cell: the cell's
    exact mass times the distribution function at its middle.
    """
    (successes, trials), (other_successes, other_trials) = counts, other
    edges = np.linspace(0, 1, CELLS + 1)
    mass = np.diff(betainc(JEFFREYS + other_successes, JEFFREYS + other_trials - other_successes, edges))
    below = np.clip((edges[:-1] + edges[1:]) / 2 - margin, 0, 1)
    return float(mass @ betainc(JEFFREYS + successes, JEFFREYS + trials - successes, below))
