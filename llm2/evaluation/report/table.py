"""A results folder's figures as tables: of accuracy, plain beside guided, and of cost.

Knows which figures stand side by side and how they are written. Leaves where they come from to metrics.json.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

from llm2.evaluation.report.read import Interval, Metrics, ModeFigures, Share, parse

COLUMNS = 100  # of the terminal
HEADER = ("", "plain, %", "guided, %", "difference", "error cut", "paired p", "n")
LABELS = {"majority": "majority@{}", "weighted": "weighted@{}", "best_of": "best of {}", "pass": "pass@{}"}
COSTS = {
    "tokens_per_problem": "tokens",
    "system1_forwards_per_problem": "System 1 forwards",
    "system2_forwards_per_problem": "System 2 forwards",
    "scoring_forwards_per_problem": "scoring forwards",
}


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

    def cells(self, n: int) -> tuple[str, ...]:
        """As HEADER names them."""
        difference, cut = "-", "-"
        if self.plain is not None and self.guided is not None:
            difference = f"{100 * (self.guided - self.plain):+.1f}"
            if self.plain < 1:  # no error, nothing to cut
                cut = f"{100 * (self.guided - self.plain) / (1 - self.plain):.0f} %"
        p = "-" if self.p is None else "< 0.001" if self.p < 0.001 else f"{self.p:.3f}"
        sides = _percent(self.plain, self.plain_ci95), _percent(self.guided, self.guided_ci95)
        return self.label, *sides, difference, cut, p, str(n)


def table(metrics: dict) -> str:
    """Plain and guided side by side as plain text of 100 columns. Raises UserError if the metrics are ill-formed."""
    parsed = parse(metrics, "the metrics")
    lines = [HEADER, *(row.cells(parsed.n) for row in rows(parsed))]
    widths = _widths(lines)
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    text = [title(parsed), "", _aligned(HEADER, widths)]
    group = None
    for row, cells in zip(rows(parsed), lines[1:], strict=True):
        if row.group != group:
            text.append(rule)
        text.append(_aligned(cells, widths))
        group = row.group
    text.append(rule)
    costs = cost_lines(parsed)
    if costs:
        text += ["", *(_aligned(line, _widths(costs)) for line in costs), ""]
    return "\n".join(text + [line for note in notes(parsed) for line in wrap(note, COLUMNS, subsequent_indent="  ")])


def markdown_table(metrics: dict) -> str:
    """The same rows as a Markdown table. Raises UserError if the metrics are ill-formed."""
    parsed = parse(metrics, "the metrics")
    lines = [HEADER, ("---", *["---:"] * (len(HEADER) - 1)), *(row.cells(parsed.n) for row in rows(parsed))]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join([title(parsed), text, *notes(parsed)])


def rows(metrics: Metrics) -> list[Row]:
    plain, guided = metrics.modes.get("plain_greedy"), metrics.modes.get("guided_greedy")
    found = []
    if plain or guided:
        p = _p_value(metrics, "greedy", "accuracy")
        sides = [(mode.accuracy, mode.ci95) if mode else (None, None) for mode in (plain, guided)]
        found.append(Row("greedy", "greedy", sides[0][0], sides[1][0], sides[0][1], sides[1][1], p))
        strict = [mode.accuracy_strict if mode else None for mode in (plain, guided)]
        if strict != [None, None]:
            found.append(Row("greedy", "greedy, strict", *strict))
    return found + [row for figure in LABELS for row in _sampling_rows(metrics, figure)]


def cost_lines(metrics: Metrics) -> list[tuple[str, ...]]:
    """What each mode costs a problem, a column a mode; nothing where it was not measured."""
    modes = {name: mode for name, mode in metrics.modes.items() if mode.system1_forwards_per_problem is not None}
    if not modes:
        return []
    lines = [(label, *(f"{getattr(mode, key):,.1f}" for mode in modes.values())) for key, label in COSTS.items()]
    return [("cost a problem", *(name.replace("_", " ") for name in modes)), *lines]


def title(metrics: Metrics) -> str:
    return f"{metrics.benchmark}, {metrics.split} split, n = {metrics.n:,}"


def notes(metrics: Metrics) -> list[str]:
    """What the columns mean, which paired tests stand behind p, how many problems changed sides, which settings."""
    said = ["[low, high]: 95 % interval. Difference in points. Error cut: share of plain's error that is gone."]
    for pair in metrics.paired:
        line = f"{pair.b} against {pair.a}, {pair.metric}: {pair.test}, p = {pair.p:.2g}"
        if pair.fixed is not None and pair.broken is not None:
            line += f"; {pair.fixed} fixed, {pair.broken} broken"
        if pair.detectable is not None:
            line += f"; this n shows {100 * pair.detectable:.1f} points or more"
        said.append(line)
    return said + [line for line in (settings(metrics), choice(metrics)) if line]


def settings(metrics: Metrics) -> str:
    """The settings in one line; nothing where metrics.json does not hold them."""
    shown = ("alpha", "beta", "top_k", "temperature", "few_shot")
    return ", ".join(f"{key} {metrics.settings[key]}" for key in shown if key in metrics.settings)


def choice(metrics: Metrics) -> str:
    """How the settings were chosen, where they were."""
    if metrics.sweep is None:
        return ""
    sweep = metrics.sweep
    chosen = ", ".join(f"{key} {value}" for key, value in sweep.chosen.items())
    problems = f"n = {sweep.n:,}, {sweep.file}" if sweep.file else f"n = {sweep.n:,}"
    return (
        f"Settings chosen on the {sweep.split} split ({problems}) by {sweep.mode} among {len(sweep.points)}: "
        f"{chosen}; reported on the {metrics.split} split."
    )


def _sampling_rows(metrics: Metrics, figure: str) -> list[Row]:
    """The rows of a figure of k samples, for each reported k that either sampling mode has."""
    modes = [metrics.modes.get(name) for name in ("plain_sampling", "guided_sampling")]
    sides = [_side(mode, f"{figure}_at") for mode in modes] + [_side(mode, f"{figure}_ci95") for mode in modes]
    found = []
    for k in sorted({*sides[0], *sides[1]}, key=int):
        voting = figure in ("majority", "pass") or k != "1"  # one sample is the best of itself
        if voting and (not metrics.reported_k or int(k) in metrics.reported_k):
            label = LABELS[figure].format(k)
            found.append(Row(figure, label, *(side.get(k) for side in sides), _p_value(metrics, "sampling", label)))
    return found


def _side(mode: ModeFigures | None, key: str) -> dict:
    return getattr(mode, key) if mode else {}


def _p_value(metrics: Metrics, kind: str, metric: str) -> float | None:
    names = {f"plain_{kind}", f"guided_{kind}"}
    return next((pair.p for pair in metrics.paired if {pair.a, pair.b} == names and pair.metric == metric), None)


def _percent(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return "-"
    if interval is None:
        return f"{100 * value:.1f}"
    low, high = interval
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _widths(lines: Sequence[tuple[str, ...]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def _aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip()
