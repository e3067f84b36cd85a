"""The mean over training seeds and problems, with an interval that covers other seeds as well as other problems."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from llm2.common.stats import BATCH, CONFIDENCE, RESAMPLES, bootstrap_p


class SeedsTest(NamedTuple):
    """A mean over seeds and problems, its 95 % interval, and two-sided p against a mean of 0."""

    mean: float
    ci95: tuple[float, float]
    p: float
    seeds: int


def seeds_bootstrap(values: np.ndarray, seed: int = 0) -> SeedsTest:
    """Percentile bootstrap of the mean of values (S, N), of S training seeds on the same N problems.

    Each resample draws seeds and, for all of them, problems, both with replacement: the interval covers another seed as
    well as other problems.
    """
    num_seeds, n = values.shape
    resampled = np.concatenate(
        [(problems @ values.T * seeds).sum(-1) / (n * num_seeds) for problems, seeds in _draws(num_seeds, n, seed)]
    )
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return SeedsTest(float(values.mean()), (float(low), float(high)), bootstrap_p(resampled), num_seeds)


@lru_cache(maxsize=2)  # 40 MB each for 2,000 problems
def _draws(num_seeds: int, n: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of resamples: how often each problem was drawn, (R, N), and each seed, (R, S).

    Cached, since drawing is slow and a study uses the same draws for every row.
    """
    generator, draws = np.random.default_rng(seed), []
    for start in range(0, RESAMPLES, BATCH):
        count = min(BATCH, RESAMPLES - start)
        problems, seeds = (generator.multinomial(m, np.full(m, 1 / m), size=count) for m in (n, num_seeds))
        draws.append((problems.astype(np.int16), seeds.astype(np.int16)))
    return draws
