"""The plots of a results folder, as PNG files and, for the page, as SVG that follows its colour scheme.

Knows how accuracy, votes, cost and a sweep are drawn. Leaves the figures themselves to metrics.json.
"""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from llm2.errors import UserError
from llm2.evaluation.report.palette import GRID, INK, SYSTEM1, SYSTEM2
from llm2.evaluation.report.read import Metrics, ModeFigures, parse
from llm2.evaluation.report.table import title

GREEDY = (("plain_greedy", "System 1\nalone", SYSTEM1), ("guided_greedy", "with\nSystem 2", SYSTEM2))
SAMPLING = (("plain_sampling", "System 1 alone", SYSTEM1, "o"), ("guided_sampling", "with System 2", SYSTEM2, "s"))
VOTES = (("majority", "majority", "-"), ("weighted", "weighted vote", ":"), ("best_of", "best of k", "--"))
THEMED = {INK: "var(--ink)", GRID: "var(--grid)", SYSTEM1: "var(--system1)", SYSTEM2: "var(--system2)"}

Panel = Callable[[Axes, Metrics], None]


def plot(metrics: dict, path: str | Path) -> None:
    """Write a PNG: greedy bars with 95 % intervals on the left, majority@k curves on the right, each where measured."""
    parsed = parse(metrics, "the metrics")
    panels = accuracy_panels(parsed)
    if not panels:
        raise UserError("the metrics hold neither a greedy mode nor majority@k: there is nothing to plot")
    draw(parsed, panels).savefig(path, dpi=160, format="png")


def figures(metrics: Metrics) -> dict[str, Figure]:
    """Every figure that the metrics have something for: name of the PNG -> figure."""
    found = {}
    if accuracy_panels(metrics):
        found["accuracy"] = draw(metrics, accuracy_panels(metrics))
    if any(mode.system1_forwards_per_problem for mode in metrics.modes.values()):
        found["cost"] = draw(metrics, [draw_cost])
    if metrics.sweep and len({point.beta for point in metrics.sweep.points}) > 1:
        found["sweep"] = draw(
            metrics, [draw_sweep], f"{metrics.benchmark}, {metrics.sweep.split}, n = {metrics.sweep.n}"
        )
    return found


def accuracy_panels(metrics: Metrics) -> list[Panel]:
    panels: list[Panel] = []
    if any(name in metrics.modes for name, *_ in GREEDY):
        panels.append(draw_greedy)
    if any(name in metrics.modes and metrics.modes[name].majority_at for name, *_ in SAMPLING):
        panels.append(draw_votes)
    return panels


def draw(metrics: Metrics, panels: Sequence[Panel], heading: str | None = None) -> Figure:
    figure = Figure(figsize=(max(5.4, 4.2 * len(panels)), 3.9), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes, metrics)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color(INK)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, length=0)
    figure.suptitle(heading or title(metrics), fontsize=12, fontweight="bold", color=INK)
    return figure


def as_svg(figure: Figure) -> str:
    """An <svg> element for a page: text stays text, and the palette's colours become the page's own variables."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llm2"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r'\s(?:xmlns(?::\w+)?)="[^"]*"', "", svg[svg.index("<svg") :]).replace("xlink:href", "href")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    for color, variable in THEMED.items():
        svg = svg.replace(color.lower(), variable)
    return svg


def draw_greedy(axes: Axes, metrics: Metrics) -> None:
    bars = [bar for bar in GREEDY if bar[0] in metrics.modes]
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
    axes.set_title("greedy", color=INK, fontsize=11)
    _percent_scale(axes)


def draw_votes(axes: Axes, metrics: Metrics) -> None:
    """majority@k with its band; the weighted vote and the best of k as thinner lines beside it."""
    ends, ks = [], set()
    for name, label, color, marker in SAMPLING:
        mode = metrics.modes.get(name)
        if mode is None or not mode.majority_at:
            continue
        for figure, kind, line in VOTES:
            points = _curve(mode, figure)
            if not points:
                continue
            main = figure == "majority"
            every = [index for index, (k, _) in enumerate(points) if not metrics.reported_k or k in metrics.reported_k]
            style = {"linestyle": line, "linewidth": 2.2 if main else 1.5}
            if main:
                style |= {"marker": marker, "markevery": every, "markersize": 6}
                ends.append(points[-1])
                ks |= {k for k, _ in points if not metrics.reported_k or k in metrics.reported_k}
            axes.plot(*zip(*points, strict=True), color=color, label=label if main else f"  {kind}", **style)
        band = sorted((int(k), 100 * low, 100 * high) for k, (low, high) in mode.majority_ci95.items())
        if band:
            axes.fill_between(*zip(*band, strict=True), color=color, alpha=0.18, linewidth=0)
    for end in ends:  # the higher end is written higher, so that close ends stay legible
        side = "bottom" if end == max(ends, key=lambda point: point[1]) else "top"
        axes.annotate(f"{end[1]:.1f}", end, (7, 0), textcoords="offset points", va=side, color=INK)
    axes.set_xscale("log")  # votes have diminishing returns: each doubling counts alike
    axes.set_xticks(sorted(ks), [str(k) for k in sorted(ks)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(ks) * 0.85, max(ks) * 1.6)
    axes.set_xlabel("k, samples that vote", color=INK)
    axes.set_title("majority@k", color=INK, fontsize=11)
    axes.legend(frameon=False, loc="lower right", labelcolor=INK, fontsize=9)
    _percent_scale(axes)


def draw_cost(axes: Axes, metrics: Metrics) -> None:
    """Accuracy against forwards a problem: a point for greedy, a curve of votes for sampling."""
    for (greedy, *_), (sampling, label, color, marker) in zip(GREEDY, SAMPLING, strict=True):
        mode = metrics.modes.get(greedy)
        if mode and mode.system1_forwards_per_problem:
            point = _forwards(mode), 100 * mode.accuracy
            axes.plot(*point, color=color, marker="D", markersize=8, linestyle="none", label=f"{label}, greedy")
        mode = metrics.modes.get(sampling)
        if mode and mode.system1_forwards_per_problem and mode.majority_at:
            n = max(map(int, mode.majority_at))
            for figure, kind, line in VOTES[:1] + VOTES[2:]:
                scoring = 0.0 if figure == "majority" else (mode.scoring_forwards_per_problem or 0.0)
                points = [((_forwards(mode) + scoring) * k / n, value) for k, value in _curve(mode, figure)]
                if points:
                    style = {"linestyle": line, "marker": marker, "markersize": 4}
                    axes.plot(*zip(*points, strict=True), color=color, label=f"{label}, {kind}", **style)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [m * 10**e for e in range(7) for m in (1, 2, 5) if low <= m * 10**e <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{tick:,}" for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("forwards of both systems a problem", color=INK)
    axes.legend(frameon=False, loc="lower right", labelcolor=INK, fontsize=8)
    axes.set_title("what accuracy costs", color=INK, fontsize=11)
    _percent_scale(axes)


def draw_sweep(axes: Axes, metrics: Metrics) -> None:
    """Validation accuracy over beta, a line for each combination of the other settings; the chosen point is ringed."""
    lines: dict[tuple, list] = {}
    for point in metrics.sweep.points:
        lines.setdefault((point.alpha, point.top_k, point.temperature), []).append(point)
    several = [len({key[i] for key in lines}) > 1 for i in range(3)]
    styles = zip("osD^vPX*", (SYSTEM2, SYSTEM1, INK) * 3, strict=False)
    for (key, points), (marker, color) in zip(sorted(lines.items(), key=str), styles, strict=False):
        points = sorted(points, key=lambda point: point.beta)
        accuracy = [100 * point.accuracy for point in points]
        errors = [
            [100 * (point.accuracy - point.ci95[0]) for point in points],
            [100 * (point.ci95[1] - point.accuracy) for point in points],
        ]
        names = zip(("alpha", "top_k", "temperature"), key, several, strict=True)
        label = ", ".join(f"{name} {value}" for name, value, varied in names if varied) or None
        betas = [point.beta for point in points]
        axes.errorbar(betas, accuracy, errors, color=color, marker=marker, linewidth=1.8, capsize=3, label=label)
    best = metrics.sweep.chosen["beta"], 100 * max(point.accuracy for point in metrics.sweep.points)
    axes.plot(*best, marker="o", markersize=15, markerfacecolor="none", markeredgecolor=INK, linestyle="none")
    axes.annotate("chosen", best, (0, 12), textcoords="offset points", ha="center", color=INK)
    axes.set_xlabel("beta, weight of System 2", color=INK)
    axes.set_title(f"{metrics.sweep.mode.replace('_', ' ')} on the {metrics.sweep.split} split", color=INK, fontsize=11)
    if any(several):
        axes.legend(frameon=False, loc="lower right", labelcolor=INK, fontsize=9)
    _percent_scale(axes)


def _curve(mode: ModeFigures, figure: str) -> list[tuple[int, float]]:
    return sorted((int(k), 100 * value) for k, value in getattr(mode, f"{figure}_at").items())


def _forwards(mode: ModeFigures) -> float:
    return mode.system1_forwards_per_problem + (mode.system2_forwards_per_problem or 0.0)


def _percent_scale(axes: Axes) -> None:
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("accuracy, % (with 95 % interval)" if axes.get_title() == "greedy" else "accuracy, %", color=INK)
