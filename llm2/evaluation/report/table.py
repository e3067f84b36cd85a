"""Tables of metrics.json: accuracy of plain and guided decoding side by side, and cost per problem."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from textwrap import wrap

from llm2.config import Mode, Share
from llm2.evaluation.metrics import FIGURES, GREEDY, SAMPLING, SEARCH
from llm2.evaluation.report.read import Interval, Metrics

COLUMNS = 100  # width in characters
HEADER = ("", "plain, %", "guided, %", "difference", "error red.", "paired p", "n")
COSTS = {
    "tokens_per_problem": "tokens",
    "system1_forwards_per_problem": "System 1 forwards",
    "system2_forwards_per_problem": "System 2 forwards",
    "scoring_forwards_per_problem": "scoring forwards",
}


@dataclass(frozen=True)
class Row:
    """One figure for plain and guided decoding."""

    group: str  # a rule separates groups
    label: str
    plain: Share | None
    guided: Share | None
    plain_ci95: Interval | None = None
    guided_ci95: Interval | None = None
    p: float | None = None

    def cells(self, n: int) -> tuple[str, ...]:
        """The columns of HEADER."""
        difference, error_reduction = "-", "-"
        if self.plain is not None and self.guided is not None:
            difference = f"{100 * (self.guided - self.plain):+.1f}"
            if self.plain < 1:  # there is an error to reduce
                error_reduction = f"{100 * (self.guided - self.plain) / (1 - self.plain):.0f} %"
        p = "-" if self.p is None else "< 0.001" if self.p < 0.001 else f"{self.p:.3f}"
        sides = _percent(self.plain, self.plain_ci95), _percent(self.guided, self.guided_ci95)
        return self.label, *sides, difference, error_reduction, p, str(n)


def table(metrics: Metrics) -> str:
    """Plain and guided side by side, as plain text of at most 100 columns."""
    lines = [(row.group, row.cells(metrics.n)) for row in rows(metrics)]
    widths = _widths([HEADER, *(cells for _, cells in lines)])
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    text = [title(metrics), "", _align(HEADER, widths)]
    for _, group in groupby(lines, key=itemgetter(0)):
        text += [rule, *(_align(cells, widths) for _, cells in group)]
    text.append(rule)
    costs = cost_lines(metrics)
    if costs:
        text += ["", *(_align(line, _widths(costs)) for line in costs), ""]
    return "\n".join(text + [line for note in notes(metrics) for line in wrap(note, COLUMNS, subsequent_indent="  ")])


def rows(metrics: Metrics) -> list[Row]:
    table_rows = _single_rows(metrics, "greedy", GREEDY) + _single_rows(metrics, "search", SEARCH)
    return table_rows + [row for figure in FIGURES for row in _sampling_rows(metrics, figure)]


def cost_lines(metrics: Metrics) -> list[tuple[str, ...]]:
    """Cost per problem, a column per mode; empty if it was not measured."""
    modes = {name: mode for name, mode in metrics.modes.items() if mode.system1_forwards_per_problem is not None}
    if not modes:
        return []
    costs = {label: [getattr(mode, key) for mode in modes.values()] for key, label in COSTS.items()}
    lines = [(label, *("-" if cost is None else f"{cost:,.1f}" for cost in row)) for label, row in costs.items()]
    return [("cost per problem", *(name.replace("_", " ") for name in modes)), *lines]


def title(metrics: Metrics) -> str:
    return f"{metrics.benchmark}, {metrics.split} split, n = {metrics.n:,}"


def notes(metrics: Metrics) -> list[str]:
    """The columns' meaning, the paired tests, the settings and how they were chosen."""
    lines = ["[low, high]: 95 % interval. Difference in points. Error red.: relative error reduction."]
    for pair in metrics.paired:
        line = f"{pair.b} against {pair.a}, {pair.metric}: {pair.test}, p = {pair.p:.2g}"
        if pair.fixed is not None and pair.broken is not None:
            line += f"; {pair.fixed} fixed, {pair.broken} broken"
        if pair.detectable is not None:
            line += f"; this n shows {100 * pair.detectable:.1f} points or more"
        lines.append(line)
    return lines + [line for line in (settings(metrics), choice(metrics)) if line]


def settings(metrics: Metrics) -> str:
    """The settings in one line, without those that are null; empty if metrics.json does not hold them."""
    keys = ("alpha", "beta", "top_k", "temperature", "few_shot", "logits_processor", "accept")
    return ", ".join(f"{key} {metrics.settings[key]}" for key in keys if metrics.settings.get(key) is not None)


def choice(metrics: Metrics) -> str:
    """How the settings were chosen; empty if they were not."""
    if metrics.sweep is None:
        return ""
    sweep = metrics.sweep
    chosen = ", ".join(f"{key} {value}" for key, value in sweep.chosen.items())
    problems = f"n = {sweep.n:,}, {sweep.file}" if sweep.file else f"n = {sweep.n:,}"
    return (
        f"Settings chosen on the {sweep.split} split ({problems}) by {sweep.mode} among {len(sweep.points)}: "
        f"{chosen}; reported on the {metrics.split} split."
    )


def _single_rows(metrics: Metrics, label: str, pair: tuple[Mode, Mode]) -> list[Row]:
    """The rows of modes with one solution a problem."""
    modes = [metrics.modes.get(mode) for mode in pair]
    if not any(modes):
        return []
    accuracies, intervals = ([mode and getattr(mode, name) for mode in modes] for name in ("accuracy", "ci95"))
    table_rows = [Row(label, label, *accuracies, *intervals, _p_value(metrics, pair, "accuracy"))]
    strict = [mode and mode.accuracy_strict for mode in modes]
    return table_rows + [Row(label, f"{label}, strict", *strict)] * (strict != [None, None])


def _sampling_rows(metrics: Metrics, figure: str) -> list[Row]:
    """The rows of a figure of k samples, for each reported k that either sampling mode has."""
    modes = [metrics.modes.get(mode) for mode in SAMPLING]
    columns = [getattr(mode, f"{figure}_{kind}", {}) for kind in ("at", "ci95") for mode in modes]
    table_rows = []
    for k in sorted({*columns[0], *columns[1]}, key=int):
        redundant = k == "1" and figure in ("best_of", "weighted")  # equal to majority@1
        if not redundant and (not metrics.reported_k or int(k) in metrics.reported_k):
            label = FIGURES[figure].format(k)
            p = _p_value(metrics, SAMPLING, label)
            table_rows.append(Row(figure, label, *(column.get(k) for column in columns), p))
    return table_rows


def _p_value(metrics: Metrics, modes: tuple[Mode, Mode], metric: str) -> float | None:
    return next((pair.p for pair in metrics.paired if (pair.a, pair.b, pair.metric) == (*modes, metric)), None)


def _percent(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return "-"
    if interval is None:
        return f"{100 * value:.1f}"
    low, high = interval
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _widths(lines: Sequence[tuple[str, ...]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def _align(cells: tuple[str, ...], widths: list[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip()
