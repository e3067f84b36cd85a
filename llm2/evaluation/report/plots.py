"""The plots of a results folder: accuracy, votes, cost and a sweep, as PNG and as SVG for the page."""

import io
import re
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from llm2.evaluation.metrics import GREEDY, SAMPLING
from llm2.evaluation.report.palette import GRID, INK, SYSTEM1, SYSTEM2
from llm2.evaluation.report.read import Metrics, ModeFigures
from llm2.evaluation.report.table import title

SYSTEMS = (("System 1 alone", SYSTEM1, "o"), ("with System 2", SYSTEM2, "s"))  # label, colour, marker: plain, guided
VOTES = (("majority", "majority", "-"), ("weighted", "weighted vote", ":"), ("best_of", "best of k", "--"))
THEMED = {INK: "var(--ink)", GRID: "var(--grid)", SYSTEM1: "var(--system1)", SYSTEM2: "var(--system2)"}

Panel = Callable[[Axes, Metrics], None]


def figures(metrics: Metrics) -> dict[str, Figure]:
    """Every figure that the metrics have data for: file name without suffix -> figure."""
    drawn = {}
    panels: list[Panel] = []
    if any(mode in metrics.modes for mode in GREEDY):
        panels.append(draw_greedy)
    if any(mode in metrics.modes and metrics.modes[mode].majority_at for mode in SAMPLING):
        panels.append(draw_votes)
    if panels:
        drawn["accuracy"] = draw(metrics, panels)
    if any(mode.system1_forwards_per_problem for mode in metrics.modes.values()):
        drawn["cost"] = draw(metrics, [draw_cost])
    sweep = metrics.sweep
    if sweep and len({point.beta for point in sweep.points}) > 1:
        drawn["sweep"] = draw(metrics, [draw_sweep], f"{metrics.benchmark}, {sweep.split}, n = {sweep.n}")
    return drawn


def draw(metrics: Metrics, panels: Sequence[Panel], heading: str | None = None) -> Figure:
    figure = Figure(figsize=(max(5.4, 4.2 * len(panels)), 4.3), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes, metrics)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color(INK)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, length=0)
    figure.suptitle(heading or title(metrics), fontsize=12, fontweight="bold", color=INK, parse_math=False)
    return figure


def as_svg(figure: Figure, name: str) -> str:
    """An <svg> element for the page: text stays text, the palette's colours become CSS variables, and ids are prefixed
    with `name`."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llm2"}):
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = re.sub(r'\s(?:xmlns(?::\w+)?)="[^"]*"', "", svg[svg.index("<svg") :]).replace("xlink:href", "href")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\1{name}-", svg)
    for color, variable in THEMED.items():
        svg = svg.replace(color.lower(), variable)
    return svg


def draw_greedy(axes: Axes, metrics: Metrics) -> None:
    """A bar per mode with its 95 % interval."""
    bars = [(metrics.modes.get(name), *system) for name, system in zip(GREEDY, SYSTEMS, strict=True)]
    bars = [bar for bar in bars if bar[0]]
    for x, (mode, _, color, _) in enumerate(bars):
        low, high = mode.ci95 or (mode.accuracy, mode.accuracy)
        axes.bar(x, 100 * mode.accuracy, width=0.58, color=color)
        if mode.ci95:
            errors = [[100 * (mode.accuracy - low)], [100 * (high - mode.accuracy)]]
            axes.errorbar(x, 100 * mode.accuracy, errors, color=INK, capsize=5, linewidth=1.4)
        axes.text(x, 100 * high + 1.5, f"{100 * mode.accuracy:.1f}", ha="center", fontweight="bold", color=INK)
    axes.set_xticks(range(len(bars)), [label for _, label, *_ in bars], fontsize=10.5)
    axes.set_xlim(-0.6, len(bars) - 0.4)
    axes.set_title("greedy", color=INK, fontsize=11)
    _percent_scale(axes)


def draw_votes(axes: Axes, metrics: Metrics) -> None:
    """majority@k with its band; weighted votes and best of k as thinner lines."""
    ends, marked_ks = [], set()
    for name, (label, color, marker) in zip(SAMPLING, SYSTEMS, strict=True):
        mode = metrics.modes.get(name)
        if mode is None or not mode.majority_at:
            continue
        for figure, kind, line in VOTES:
            curve = _curve(metrics, mode, figure)
            if figure == "majority":
                marked = [index for index, (k, _) in enumerate(curve) if _is_reported(metrics, k)]
                style = {"linewidth": 2.2, "marker": marker, "markevery": marked, "markersize": 6, "label": label}
                ends.append(curve[-1])
                marked_ks |= {curve[index][0] for index in marked}
            else:
                style = {"linewidth": 1.5, "label": f"  {kind}"}
            if curve:
                axes.plot(*zip(*curve, strict=True), color=color, linestyle=line, **style)
        ks = [k for k, _ in _curve(metrics, mode, "majority") if str(k) in mode.majority_ci95]
        if ks:
            low, high = 100 * np.array([mode.majority_ci95[str(k)] for k in ks]).T
            axes.fill_between(ks, low, high, color=color, alpha=0.18, linewidth=0)
    for end in ends:  # the label of the higher end is above its point, so that close ends stay legible
        side = "bottom" if end == max(ends, key=lambda point: point[1]) else "top"
        axes.annotate(f"{end[1]:.1f}", end, (7, 0), textcoords="offset points", va=side, color=INK)
    axes.set_xscale("log")  # votes have diminishing returns
    axes.set_xticks(sorted(marked_ks), [str(k) for k in sorted(marked_ks)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(marked_ks) * 0.85, max(marked_ks) * 1.6)
    axes.set_xlabel("k, samples that vote (odd k, and those marked)", color=INK)
    axes.set_title("majority@k", color=INK, fontsize=11)
    _legend(axes)
    _percent_scale(axes)


def draw_cost(axes: Axes, metrics: Metrics) -> None:
    """Accuracy against forwards per problem: a point for greedy, curves of votes for sampling."""
    for greedy, sampling, (label, color, marker) in zip(GREEDY, SAMPLING, SYSTEMS, strict=True):
        mode = metrics.modes.get(greedy)
        if mode and mode.system1_forwards_per_problem:
            point = _forwards(mode), 100 * mode.accuracy
            axes.plot(*point, color=color, marker="D", markersize=8, linestyle="none", label=f"{label}, greedy")
        mode = metrics.modes.get(sampling)
        if mode and mode.system1_forwards_per_problem and mode.majority_at:
            n = max(map(int, mode.majority_at))
            for figure, kind, line in VOTES[:1] + VOTES[2:]:
                scoring = 0.0 if figure == "majority" else (mode.scoring_forwards_per_problem or 0.0)
                points = [((_forwards(mode) + scoring) * k / n, value) for k, value in _curve(metrics, mode, figure)]
                if points:
                    style = {"linestyle": line, "marker": marker, "markersize": 4}
                    axes.plot(*zip(*points, strict=True), color=color, label=f"{label}, {kind}", **style)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [m * 10**e for e in range(7) for m in (1, 2, 5) if low <= m * 10**e <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{tick:,}" for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("forwards of both systems per problem", color=INK)
    axes.set_title("what accuracy costs", color=INK, fontsize=11)
    _legend(axes)
    _percent_scale(axes)


def draw_sweep(axes: Axes, metrics: Metrics) -> None:
    """Validation accuracy over beta, a line per combination of the other settings, a ring around the chosen point."""
    lines: dict[tuple, list] = {}
    for point in metrics.sweep.points:
        lines.setdefault((point.alpha, point.top_k, point.temperature), []).append(point)
    varies = [len({key[i] for key in lines}) > 1 for i in range(3)]
    styles = zip("osD^vPX*", (SYSTEM2, SYSTEM1, INK) * 3, strict=False)
    for (key, points), (marker, color) in zip(sorted(lines.items(), key=str), styles, strict=False):
        points = sorted(points, key=lambda point: point.beta)
        accuracy = [100 * point.accuracy for point in points]
        errors = [
            [100 * (point.accuracy - point.ci95[0]) for point in points],
            [100 * (point.ci95[1] - point.accuracy) for point in points],
        ]
        settings = zip(("alpha", "top_k", "temperature"), key, varies, strict=True)
        label = ", ".join(f"{name} {value}" for name, value, shown in settings if shown) or None
        betas = [point.beta for point in points]
        axes.errorbar(betas, accuracy, errors, color=color, marker=marker, linewidth=1.8, capsize=3, label=label)
    best = metrics.sweep.chosen["beta"], 100 * max(point.accuracy for point in metrics.sweep.points)
    axes.plot(*best, marker="o", markersize=15, markerfacecolor="none", markeredgecolor=INK, linestyle="none")
    axes.annotate("chosen", best, (0, 12), textcoords="offset points", ha="center", color=INK)
    axes.set_xlabel("beta, weight of System 2", color=INK)
    axes.set_title(f"{metrics.sweep.mode.replace('_', ' ')} on the {metrics.sweep.split} split", color=INK, fontsize=11)
    if any(varies):
        _legend(axes)
    _percent_scale(axes)


def _curve(metrics: Metrics, mode: ModeFigures, figure: str) -> list[tuple[int, float]]:
    """Percent over k. Majority only at odd k and the reported ones: ties at even k would draw a staircase."""
    values = sorted((int(k), 100 * value) for k, value in getattr(mode, f"{figure}_at").items())
    return [(k, value) for k, value in values if figure != "majority" or k % 2 or _is_reported(metrics, k)]


def _is_reported(metrics: Metrics, k: int) -> bool:
    return not metrics.reported_k or k in metrics.reported_k


def _forwards(mode: ModeFigures) -> float:
    return mode.system1_forwards_per_problem + (mode.system2_forwards_per_problem or 0.0)


def _legend(axes: Axes) -> None:
    """Draw the legend below the axes, where its markers cannot be mistaken for data."""
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "ncols": 2}
    axes.legend(frameon=False, labelcolor=INK, fontsize=8, **place)


def _percent_scale(axes: Axes) -> None:
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("accuracy, % (with 95 % interval)" if axes.get_title() == "greedy" else "accuracy, %", color=INK)
