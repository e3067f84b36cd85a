"""metrics.json, validated. Figures are fractions of 1."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated

from llm2.common.files import read_text
from llm2.config import Mode, Share
from llm2.errors import UserError, shown

Interval = tuple[Share, Share]
K = Annotated[str, Field(pattern=r"^[1-9]\d*$")]  # the k of majority@k and pass@k, as a JSON key


@validated(frozen=True)
class ModeFigures:
    """One mode of metrics.json; unknown keys are ignored."""

    accuracy: Share
    ci95: Interval | None = None
    accuracy_strict: Share | None = None
    majority_at: dict[K, Share] = Field(default_factory=dict)  # k -> majority@k; the sampling modes only
    majority_ci95: dict[K, Interval] = Field(default_factory=dict)
    pass_at: dict[K, Share] = Field(default_factory=dict)
    pass_ci95: dict[K, Interval] = Field(default_factory=dict)
    best_of_at: dict[K, Share] = Field(default_factory=dict)  # k -> accuracy of the sample with the highest score
    best_of_ci95: dict[K, Interval] = Field(default_factory=dict)
    weighted_at: dict[K, Share] = Field(default_factory=dict)  # k -> the vote weighted by the verifier's scores
    weighted_ci95: dict[K, Interval] = Field(default_factory=dict)
    tokens_per_problem: float | None = None
    system1_forwards_per_problem: float | None = None
    system2_forwards_per_problem: float | None = None
    scoring_forwards_per_problem: float | None = None


@validated(frozen=True)
class Paired:
    """A paired comparison of two modes on the same problems."""

    a: Mode
    b: Mode
    metric: str  # "accuracy", "majority@5", "best of 5", ...
    p: Share
    test: str
    fixed: int | None = None  # problems on which b is better; null if the test does not count problems
    broken: int | None = None  # problems on which a is better
    difference: float | None = None
    ci95: tuple[float, float] | None = None
    detectable: float | None = None  # the smallest difference that this n shows with a power of 0.8


@validated(frozen=True)
class Point:
    """Settings tried on the validation split, and their accuracy there."""

    accuracy: Share
    ci95: Interval
    alpha: float
    beta: float
    top_k: int | None
    temperature: float


@validated(frozen=True)
class Sweep:
    """How the settings were chosen."""

    split: str
    n: int
    mode: Mode
    chosen: dict[str, Any]
    points: list[Point]
    file: str | None = None  # its problems, unless they are the task's validation split


@validated(frozen=True)
class Metrics:
    benchmark: str  # name of the task
    split: str
    n: Annotated[int, Field(ge=1)]
    modes: dict[Mode, ModeFigures]
    paired: list[Paired] = Field(default_factory=list)
    reported_k: list[int] = Field(default_factory=list)  # the k in tables; all when empty
    settings: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    git_commit: str | None = None
    seed: int = 0
    sweep: Sweep | None = None


def read_metrics(path: str | Path) -> Metrics:
    """Raises UserError that names the file and what is wrong with it."""
    if not Path(path).exists():
        raise UserError(f"cannot read {path}: No such file or directory; `python -m llm2 evaluate` writes it")
    try:
        metrics = json.loads(read_text(path, "metrics"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    return parse(metrics, str(path))


def parse(metrics: Any, source: str) -> Metrics:
    """Validate metrics; `source` names them in error messages."""
    if not isinstance(metrics, dict):
        raise UserError(f"{source}: expected an object with benchmark, split, n and modes")
    try:
        return TypeAdapter(Metrics).validate_python(metrics)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise UserError(f"{source}: the key {key!r} is missing") from None
        expected = first["msg"][0].lower() + first["msg"][1:]
        raise UserError(f"{source}, key {key!r}: found {shown(first['input'])}, expected: {expected}") from None
