"""A property of fuzzing, and its trial with hypothesis, which counts the inputs that were really tried."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from tests.robustness.row import Row

ROUND = 2_000  # inputs of one run of hypothesis: it keeps a tree of all that it has tried


@dataclass(frozen=True)
class Property:
    what: str
    strategy: SearchStrategy
    check: Callable[[Any, Path], None]  # an input, a folder of its own; raises where the property does not hold
    inputs: int  # of the long run
    seconds: float = 2.0  # of the CPU, that an input may take at most


def fuzz(each: Property, folder: Path, scale: float) -> Row:
    """Try inputs in rounds, each with its own seed; stop at the first failures, which hypothesis has made small."""
    folder.mkdir(parents=True, exist_ok=True)
    tried, slowest, total, number = 0, 0.0, max(1, round(each.inputs * scale)), 0

    def check(value: Any) -> None:
        nonlocal tried, slowest
        tried += 1
        began = time.process_time()
        each.check(value, folder)
        seconds = time.process_time() - began
        slowest = max(slowest, seconds)
        assert seconds < each.seconds, f"took {seconds:.1f} s"

    while tried < total:
        before, count = tried, min(ROUND, total - tried)
        try:
            _in_hypothesis(seed(number)(given(each.strategy)(check)), count)
        except Exception as error:  # whatever a check raises is its finding
            found = error.exceptions if isinstance(error, ExceptionGroup) else [error]
            return Row(each.what, tried, len(found), "\n".join(map(_described, found)))
        if tried - before < count / 2:  # there are no more different inputs
            break
        number += 1
    return Row(each.what, tried, 0, f"slowest {slowest:.2f} s")


def _in_hypothesis(test: Callable[[], None], count: int) -> None:
    settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )(test)()


def _described(error: Exception) -> str:
    notes = " ".join(getattr(error, "__notes__", ()))  # the small input
    return f"{type(error).__name__}: {error!s:.300} {notes:.1200}"
