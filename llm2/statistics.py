"""Figures from graded samples, and how sure one may be of them.

Knows majority@k, pass@k, 95 % intervals and paired tests. Leaves reading answers to grading.py and tables to report.py.
Everything is exact or seeded; the distributions and the resampling are scipy's.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
RESAMPLES = 9_999
BATCH = 500  # resamples held in memory at a time


@dataclass(frozen=True)
class PairedTest:
    """Two modes on the same problems: b (the newer) minus a (the baseline)."""

    difference: float  # mean of b - mean of a
    ci95: tuple[float, float]
    p: float  # two-sided
    test: str
    fixed: int  # problems on which b is better
    broken: int  # problems on which a is better


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; all of [0, 1] where nothing was observed."""
    if n == 0:
        return 0.0, 1.0
    interval = stats.binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of per-problem fractions in [0, 1], such as majority@k.

    Where all are equal, resampling shows no spread at all; Wilson's interval, which is the wider one, stands in.
    """
    values = np.asarray(values, dtype=float)  # (N,)
    if len(set(values.tolist())) < 2:
        return wilson_interval(round(values.sum()), len(values))
    return _bootstrap(values, seed)


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
    votes = Counter(answers)
    blank, own = votes.pop(None, 0), votes.pop(gold, 0)
    return _chance_of_winning(own, tuple(sorted(votes.values())), blank, k)


@lru_cache(maxsize=100_000)
def _chance_of_winning(own: int, others: tuple[int, ...], blank: int, k: int) -> float:
    """The share of k-subsets in which an answer with `own` votes wins against answers with `others` votes each.

    Subsets are counted by how many votes they hold and how many answers tie: a polynomial sum, not an enumeration.
    """
    won = Fraction(0)
    for best in range(1, min(own, k) + 1):  # gold's votes in the subset: no other answer has more
        ways = Counter({(best, 1): math.comb(own, best)})  # (votes used, answers that tie) -> subsets
        for count in others:
            extended = Counter()
            for (used, tied), number in ways.items():
                for taken in range(min(count, best, k - used) + 1):
                    extended[used + taken, tied + (taken == best)] += number * math.comb(count, taken)
            ways = extended
        for (used, tied), number in ways.items():
            won += Fraction(number * math.comb(blank, k - used), tied)
    return float(won / math.comb(own + sum(others) + blank, k))


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> PairedTest:
    """McNemar's exact test of two graded runs; the interval is the exact one given the number of flips."""
    a, b = _paired(a, b, bool)
    fixed, broken = int((b & ~a).sum()), int((a & ~b).sum())
    flips = fixed + broken
    if flips == 0:
        return PairedTest(0.0, (0.0, 0.0), 1.0, "McNemar exact", 0, 0)
    test = stats.binomtest(fixed, flips)
    share = test.proportion_ci(CONFIDENCE, method="exact")
    low, high = ((2 * bound - 1) * flips / len(a) for bound in (share.low, share.high))
    difference = (fixed - broken) / len(a)
    return PairedTest(difference, (float(low), float(high)), float(test.pvalue), "McNemar exact", fixed, broken)


def paired_permutation(a: Sequence[float], b: Sequence[float], seed: int = 0) -> PairedTest:
    """Sign-flip permutation test of a per-problem difference, with a paired bootstrap interval.

    With m of n random permutations as extreme as what was seen, p is (m + 1) / (n + 1), never 0, doubled for two sides;
    with few problems all permutations are taken and p is exact.
    """
    a, b = _paired(a, b, float)
    difference = b - a  # (N,)
    fixed, broken = int((difference > 0).sum()), int((difference < 0).sum())
    if not difference.any():
        return PairedTest(0.0, (0.0, 0.0), 1.0, "paired permutation", 0, 0)
    test = stats.permutation_test(
        (a, b),
        _mean_difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=BATCH,
        rng=seed,
    )
    mean = float(difference.mean())
    return PairedTest(mean, _bootstrap(difference, seed), float(test.pvalue), "paired permutation", fixed, broken)


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


def _mean_difference(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    return (b - a).mean(axis=axis)


def _bootstrap(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Percentile bootstrap of the mean; no interval but the point itself where all values are equal."""
    if (values == values[0]).all():
        return float(values[0]), float(values[0])
    result = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=BATCH,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=seed,
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _paired(a: Sequence, b: Sequence, kind: type) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=kind), np.asarray(b, dtype=kind)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"expected two vectors of one length over the same problems, found {a.shape} and {b.shape}")
    return a, b


def _check_k(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must be 1 to {n}, the number of samples, found {k}")
