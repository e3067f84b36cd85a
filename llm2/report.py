"""What a results folder says: the table that the quickstart prints, and its plot.

Knows the contract of metrics.json (figures are fractions of 1) and how to lay plain and guided side by side. Leaves
decoding, grading, intervals and paired tests to others: every figure here was computed before it was written.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated

from llm2.errors import UserError

SYSTEM1 = "#3A6EA5"  # blue: plain decoding, System 1
SYSTEM2 = "#E69F00"  # amber: guided decoding, System 2; blue and amber stay apart for every kind of colour blindness
WRONG = "#B5494E"  # muted red; always beside a mark or a word, never the only sign
INK = "#2B2F36"
COLUMNS = 100  # of the terminal

Share = Annotated[float, Field(ge=0, le=1)]
Interval = tuple[Share, Share]
K = Annotated[str, Field(pattern=r"^[1-9]\d*$")]  # the k of majority@k and pass@k, as a JSON key


@validated(frozen=True)
class ModeFigures:
    """One mode of metrics.json; keys that this module does not use are ignored."""

    accuracy: Share
    ci95: Interval | None = None
    accuracy_strict: Share | None = None
    majority_at: dict[K, Share] = Field(default_factory=dict)  # k -> majority@k; the sampling modes only
    majority_ci95: dict[K, Interval] = Field(default_factory=dict)
    pass_at: dict[K, Share] = Field(default_factory=dict)
    pass_ci95: dict[K, Interval] = Field(default_factory=dict)


@validated(frozen=True)
class Paired:
    """A paired comparison of two modes on the same problems."""

    a: str
    b: str
    metric: str  # "accuracy" or "majority@k"
    p: Share
    test: str
    fixed: int | None = None  # problems right in b alone; null where the test does not count problems
    broken: int | None = None  # problems right in a alone


@validated(frozen=True)
class Metrics:
    benchmark: str
    split: str
    n: Annotated[int, Field(ge=1)]
    modes: dict[str, ModeFigures]
    paired: list[Paired] = Field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """A figure of plain decoding beside the same figure of guided decoding."""

    group: str  # rows of a group stand together
    label: str
    plain: Share | None
    guided: Share | None
    plain_ci95: Interval | None = None
    guided_ci95: Interval | None = None
    p: float | None = None


HEADER = ("", "plain, %", "guided, %", "difference", "error cut", "paired p", "n")


def table(metrics: dict) -> str:
    """Plain and guided side by side as plain text of 100 columns. Raises UserError if the metrics are ill-formed."""
    parsed = _parse(metrics, "the metrics")
    lines = [HEADER, *(_cells(row, parsed.n) for row in _rows(parsed))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    text = [_title(parsed), "", _aligned(HEADER, widths)]
    group = None
    for row, cells in zip(_rows(parsed), lines[1:], strict=True):
        if row.group != group:
            text.append(rule)
        text.append(_aligned(cells, widths))
        group = row.group
    notes = [line for note in _notes(parsed) for line in wrap(note, COLUMNS, subsequent_indent="  ")]
    return "\n".join([*text, rule, *notes])


def markdown_table(metrics: dict) -> str:
    """The same rows as a Markdown table. Raises UserError if the metrics are ill-formed."""
    parsed = _parse(metrics, "the metrics")
    lines = [HEADER, ("---", *["---:"] * (len(HEADER) - 1)), *(_cells(row, parsed.n) for row in _rows(parsed))]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join([_title(parsed), text, *_notes(parsed)])


def plot(metrics: dict, path: str | Path) -> None:
    """Write a PNG: greedy bars with 95 % intervals on the left, majority@k curves on the right, each where measured."""
    parsed = _parse(metrics, "the metrics")
    panels = []
    if any(name in parsed.modes for name in ("plain_greedy", "guided_greedy")):
        panels.append(_draw_greedy)
    if any(name in parsed.modes and parsed.modes[name].majority_at for name in ("plain_sampling", "guided_sampling")):
        panels.append(_draw_majority)
    if not panels:
        raise UserError("the metrics hold neither a greedy mode nor majority@k: there is nothing to plot")
    figure = Figure(figsize=(4.2 * len(panels), 3.9), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, parsed)
        axes.set_ylim(0, 108)
        axes.set_yticks(range(0, 101, 20))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E6E8EB", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, length=0)
    figure.suptitle(_title(parsed), fontsize=12, fontweight="bold", color=INK)
    figure.savefig(path, dpi=160, format="png")


def write_report(folder: str | Path) -> str:
    """Read FOLDER/metrics.json, write FOLDER/accuracy.png, return the table. Raises UserError for a bad file."""
    metrics = read_metrics(Path(folder) / "metrics.json")
    plot(metrics, Path(folder) / "accuracy.png")
    return table(metrics)


def read_metrics(path: str | Path) -> dict:
    """The content of a metrics.json, checked. Raises UserError that names the file and what is wrong with it."""
    try:
        metrics = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; `python -m llm2 evaluate` writes it") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    _parse(metrics, str(path))
    return metrics


def _parse(metrics: Any, source: str) -> Metrics:
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
        raise UserError(f"{source}, key {key!r}: found {first['input']!r}, expected: {expected}") from None


def _rows(metrics: Metrics) -> list[Row]:
    plain, guided = metrics.modes.get("plain_greedy"), metrics.modes.get("guided_greedy")
    rows = []
    if plain or guided:
        p = _p_value(metrics, "greedy", "accuracy")
        sides = [(mode.accuracy, mode.ci95) if mode else (None, None) for mode in (plain, guided)]
        rows.append(Row("greedy", "greedy", sides[0][0], sides[1][0], sides[0][1], sides[1][1], p))
        strict = [mode.accuracy_strict if mode else None for mode in (plain, guided)]
        if strict != [None, None]:
            rows.append(Row("greedy", "greedy, strict", *strict))
    return rows + _sampling_rows(metrics, "majority") + _sampling_rows(metrics, "pass")


def _sampling_rows(metrics: Metrics, figure: str) -> list[Row]:
    """The rows of majority@k or pass@k, for each k that either sampling mode has."""
    modes = [metrics.modes.get(name) for name in ("plain_sampling", "guided_sampling")]
    values = [getattr(mode, f"{figure}_at") if mode else {} for mode in modes]
    intervals = [getattr(mode, f"{figure}_ci95") if mode else {} for mode in modes]
    rows = []
    for k in sorted({*values[0], *values[1]}, key=int):
        label = f"{figure}@{k}"
        sides = [side.get(k) for side in values + intervals]
        rows.append(Row(figure, label, *sides, _p_value(metrics, "sampling", label)))
    return rows


def _p_value(metrics: Metrics, kind: str, metric: str) -> float | None:
    names = {f"plain_{kind}", f"guided_{kind}"}
    return next((pair.p for pair in metrics.paired if {pair.a, pair.b} == names and pair.metric == metric), None)


def _cells(row: Row, n: int) -> tuple[str, ...]:
    difference, cut = "-", "-"
    if row.plain is not None and row.guided is not None:
        difference = f"{100 * (row.guided - row.plain):+.1f}"
        if row.plain < 1:  # no error, nothing to cut
            cut = f"{100 * (row.guided - row.plain) / (1 - row.plain):.0f} %"
    plain, guided = _percent(row.plain, row.plain_ci95), _percent(row.guided, row.guided_ci95)
    p = "-" if row.p is None else "< 0.001" if row.p < 0.001 else f"{row.p:.3f}"
    return row.label, plain, guided, difference, cut, p, str(n)


def _percent(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return "-"
    if interval is None:
        return f"{100 * value:.1f}"
    low, high = interval
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip()


def _title(metrics: Metrics) -> str:
    return f"{metrics.benchmark}, {metrics.split} split, n = {metrics.n:,}"


def _notes(metrics: Metrics) -> list[str]:
    """What the columns mean, which paired tests stand behind p, and how many problems changed sides."""
    notes = ["[low, high]: 95 % interval. Difference in points. Error cut: share of plain's error that is gone."]
    for pair in metrics.paired:
        line = f"{pair.b} against {pair.a}, {pair.metric}: {pair.test}, p = {pair.p:.2g}"
        if pair.fixed is not None and pair.broken is not None:
            line += f"; {pair.fixed} fixed, {pair.broken} broken"
        notes.append(line)
    return notes


def _draw_greedy(axes: Axes, metrics: Metrics) -> None:
    bars = [("plain_greedy", "System 1\nalone", SYSTEM1), ("guided_greedy", "with\nSystem 2", SYSTEM2)]
    bars = [bar for bar in bars if bar[0] in metrics.modes]
    for x, (name, _, color) in enumerate(bars):
        mode = metrics.modes[name]
        low, high = mode.ci95 or (mode.accuracy, mode.accuracy)
        axes.bar(x, 100 * mode.accuracy, width=0.58, color=color)
        if mode.ci95:
            errors = [[100 * (mode.accuracy - low)], [100 * (high - mode.accuracy)]]
            axes.errorbar(x, 100 * mode.accuracy, errors, color=INK, capsize=5, linewidth=1.4)
        axes.text(x, 100 * high + 1.5, f"{100 * mode.accuracy:.1f}", ha="center", fontweight="bold", color=INK)
    axes.set_xticks(range(len(bars)), [label for _, label, _ in bars], fontsize=10.5)
    axes.set_xlim(-0.6, len(bars) - 0.4)
    axes.set_ylabel("accuracy, % (with 95 % interval)", color=INK)
    axes.set_title("greedy", color=INK, fontsize=11)


def _draw_majority(axes: Axes, metrics: Metrics) -> None:
    curves = [("plain_sampling", "System 1 alone", SYSTEM1, "o"), ("guided_sampling", "with System 2", SYSTEM2, "s")]
    curves = [curve for curve in curves if curve[0] in metrics.modes and metrics.modes[curve[0]].majority_at]
    ends = []
    for name, label, color, marker in curves:
        mode = metrics.modes[name]
        points = sorted((int(k), 100 * value) for k, value in mode.majority_at.items())
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, linewidth=2.2, markersize=6, label=label)
        band = sorted((int(k), 100 * low, 100 * high) for k, (low, high) in mode.majority_ci95.items())
        if band:
            axes.fill_between(*zip(*band, strict=True), color=color, alpha=0.18, linewidth=0)
        ends.append(points[-1])
    for end in ends:  # the higher end is written higher, so that close ends stay legible
        side = "bottom" if end == max(ends, key=lambda point: point[1]) else "top"
        axes.annotate(f"{end[1]:.1f}", end, (7, 0), textcoords="offset points", va=side, color=INK)
    ks = {int(k) for name, *_ in curves for k in metrics.modes[name].majority_at}
    axes.set_xscale("log")  # votes have diminishing returns: each doubling counts alike
    axes.set_xticks(sorted(ks), [str(k) for k in sorted(ks)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(ks) * 0.85, max(ks) * 1.6)
    axes.set_xlabel("k, samples that vote", color=INK)
    axes.set_title("majority@k", color=INK, fontsize=11)
    axes.legend(frameon=False, loc="lower right")
