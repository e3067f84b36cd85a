"""Read and validate the files of a results folder. Figures are fractions of 1."""

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, StrictBool, StrictFloat, StrictInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from llm2.common.files import read_text
from llm2.common.jsonl import parse_json, read_jsonl
from llm2.config import Mode, ModeKey, Share
from llm2.errors import UserError, misfit

validated = partial(dataclass, config=ConfigDict(allow_inf_nan=False))
Interval = tuple[Share, Share]
Scalar = str | bool | int | float | None
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
    chosen: dict[str, Scalar]
    points: list[Point]
    file: str | None = None  # file of its problems, if not the task's validation split


@validated(frozen=True)
class Metrics:
    """The content of metrics.json; accuracies are fractions of 1."""

    benchmark: str  # name of the task
    split: str
    n: Annotated[int, Field(ge=1)]
    modes: dict[Mode, ModeFigures]
    paired: list[Paired] = Field(default_factory=list)
    reported_k: list[int] = Field(default_factory=list)  # the k in tables; all when empty
    settings: dict[str, Scalar] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    git_commit: str | None = None
    seed: int = 0
    sweep: Sweep | None = None


@validated(frozen=True)
class Sample:
    """One solution in a line of predictions.jsonl."""

    text: str
    answer: str | None
    correct: StrictBool
    tokens: StrictInt
    score: StrictFloat | None = None


@validated(frozen=True)
class Prediction:
    """A line of predictions.jsonl."""

    id: str
    question: str
    gold: str
    mode: ModeKey
    samples: Annotated[list[Sample], Field(min_length=1)]


@validated(frozen=True)
class Choice:
    """How one token was chosen, as `tracing.trace_record` writes it."""

    at: StrictInt
    candidates: list[str]
    logprobs: list[StrictFloat]
    scores: list[StrictFloat]
    chosen: StrictInt
    changed: StrictBool


@validated(frozen=True)
class Trace:
    """How the tokens of one completion were chosen."""

    tokens: list[str]
    scores: list[StrictFloat] | None
    choices: list[Choice]


@validated(frozen=True)
class Traces:
    """A line of traces.jsonl."""

    id: str
    mode: ModeKey
    traces: list[Trace]


def read_metrics(path: str | Path) -> Metrics:
    """Read metrics.json. Raises UserError with the file and the first mistake."""
    if not Path(path).exists():
        raise UserError(f"cannot read {path}: No such file or directory; `llm2 evaluate` writes it")
    return parse(parse_json(read_text(path, "metrics"), str(path)), str(path))


def read_lines(path: Path, kind: type) -> Iterator[dict]:
    """Read and validate predictions.jsonl or traces.jsonl; no lines if there is no file. Raises UserError."""
    if path.exists():
        for number, line in read_jsonl(path, "predictions", skip_torn_line=True):
            _validate(kind, line, f"{path}, line {number}")
            yield line


def parse(metrics: Any, source: str) -> Metrics:
    """Validate metrics; `source` names them in error messages."""
    if not isinstance(metrics, dict):
        raise UserError(f"{source}: expected an object with benchmark, split, n and modes")
    return _validate(Metrics, metrics, source)


def _validate(kind: type, value: dict, source: str) -> Any:
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise UserError(f"{source}: the key {key!r} is missing") from None
        raise UserError(f"{source}, key {key!r}: {misfit(first)}") from None


_adapter = cache(TypeAdapter)
