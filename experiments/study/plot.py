"""The plots of a study: every row with its interval, curves over an axis of numbers, or accuracy against a cost."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.study.bootstrap import SeedsTest
from experiments.study.config import StudyConfig, StudyPlot
from experiments.study.summary import Row
from llm2.common.files import write_bytes
from llm2.evaluation.report.palette import GRID, INK

MARKERS = "osD^vPX*"
COLOURS = ("#3A6EA5", "#E69F00", "#009E73", "#B5494E", "#CC79A7", "#56B4E9", "#8C6BB1", "#7F7F7F", "#A6761D", "#2B2F36")
TICKS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)  # of accuracies, where they differ much
PANELS = {"greedy": "greedy", "sampling": "majority of all samples"}  # end of a column's name -> title


def draw_rows(config: StudyConfig, summary: Sequence[Row]) -> Figure:
    """A line for each row, a panel for each value of `config.across`; dots are means, bars 95 % intervals."""
    names = [axis for axis in config.axes if axis not in (config.over, config.across)]
    lines = list(dict.fromkeys(", ".join(row.values.get(axis, "") for axis in names) for row in summary))
    panels = list(dict.fromkeys(row.values.get(config.across, "") for row in summary))
    columns = list(dict.fromkeys(column for row in summary for column in row.accuracies))
    figure = Figure(figsize=(2.4 * len(panels) + 2.4, 0.3 * len(lines) + 1.2), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    for axes, panel in zip(grid, panels, strict=True):
        for row in (row for row in summary if row.values.get(config.across, "") == panel):
            line = lines.index(", ".join(row.values.get(axis, "") for axis in names))
            for column, test in row.accuracies.items():
                number = columns.index(column)
                axes.errorbar(
                    100 * test.mean,
                    line + 0.22 * (number - (len(columns) - 1) / 2),
                    xerr=_bar(test),
                    **_style(number),
                    markersize=5,
                    elinewidth=1.2,
                )
        _frame(axes, panel, "accuracy, %")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    grid[0].set_yticks(range(len(lines)), lines, color=INK)
    grid[0].set_ylim(len(lines) - 0.5, -0.5)  # the first row on top
    if len(columns) > 1:
        handles = _handles(grid[0], [PANELS.get(column, column) for column in columns])
        figure.legend(handles=handles, loc="outside upper right", ncols=len(columns), frameon=False, fontsize=9)
    return figure


def draw_curves(config: StudyConfig, summary: Sequence[Row]) -> Figure:
    """Accuracy over the axis `config.curves.x`, a line for each combination of the other axes and each column."""
    x, of = config.curves.x, config.curves.panels
    panels = list(dict.fromkeys(row.values.get(of, "") for row in summary))
    lines: dict[tuple[str, str], list[tuple[float, SeedsTest]]] = {}  # panel, label -> points
    for row in summary:
        names = [value for axis, value in row.values.items() if axis not in (x, of)]
        for column, test in row.accuracies.items():
            label = ", ".join([*names, *([PANELS.get(column, column)] if len(row.accuracies) > 1 else [])])
            lines.setdefault((row.values.get(of, ""), label), []).append((float(row.values[x]), test))
    labels = list(dict.fromkeys(label for _, label in lines))
    figure = Figure(figsize=(3.8 * len(panels) + 2, 3.6), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(grid, panels, strict=True):
        axes.set_yscale("logit")  # as far from 90 to 95 % as from 5 to 10
        drawn = {
            label: sorted(points, key=lambda point: point[0]) for (at, label), points in lines.items() if at == panel
        }
        for label, points in drawn.items():
            axes.errorbar(
                [value for value, _ in points],
                [test.mean for _, test in points],
                yerr=np.hstack([_bar(test) for _, test in points]) / 100,
                **_style(labels.index(label)),
                markersize=5,
                elinewidth=1,
            )
        ticks = sorted({value for points in drawn.values() for value, _ in points})
        axes.set_xscale("symlog", linthresh=min((value for value in ticks if value > 0), default=1), linscale=0.5)
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks], rotation=45)
        low, high = axes.get_ylim()
        shown = [share for share in (TICKS if high - low > 0.3 else np.arange(0.02, 1, 0.02)) if low <= share <= high]
        axes.set_yticks(shown, [f"{100 * share:g}" for share in shown])
        axes.minorticks_off()
        _frame(axes, panel, x)
    grid[0].set_ylabel("accuracy, %", color=INK)
    if len(labels) > 1:  # one line has no name
        figure.legend(handles=_handles(grid[0], labels), loc="outside right center", frameon=False, fontsize=9)
    return figure


def draw(config: StudyConfig, plot: StudyPlot, summary: Sequence[Row]) -> Figure:
    """Points are means over seeds, bars 95 % intervals."""
    colours = {value: COLOURS[i % len(COLOURS)] for i, value in enumerate(config.axes[plot.colour])}
    markers = {value: MARKERS[i % len(MARKERS)] for i, value in enumerate(config.axes[plot.marker])}
    points = [
        (panel, row, test, row.figures.get(plot.x.format(column=column)))
        for row in summary
        for column, test in row.accuracies.items()
        for panel in PANELS
        if column.endswith(panel) and row.values.get(plot.colour) in colours
    ]
    panels = [panel for panel in PANELS if any(panel == of and x is not None for of, _, _, x in points)]
    figure = Figure(figsize=(5.6 * len(panels) + 1.6, 4.4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for of, row, test, value in points:
            if of != panel or value is None:
                continue
            axes.errorbar(
                value,
                100 * test.mean,
                yerr=_bar(test),
                color=colours[row.values[plot.colour]],
                marker=markers[row.values[plot.marker]],
                markersize=6,
                elinewidth=1,
                linestyle="none",
            )
        _frame(axes, PANELS[panel], plot.label, grid="y")
        axes.set_ylabel("accuracy, %", color=INK)
    handles = [axes.plot([], [], "o", color=colour, label=value)[0] for value, colour in colours.items()]
    handles += [axes.plot([], [], marker, color=INK, label=value)[0] for value, marker in markers.items()]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    return figure


def _frame(axes: Axes, title: str, label: str, grid: Literal["both", "y"] = "both") -> None:
    axes.set_title(title, color=INK)
    axes.set_xlabel(label, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _style(number: int) -> dict[str, str]:
    """Colour and marker of a plot's line or column."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def _handles(axes: Axes, labels: Sequence[str]) -> list[Line2D]:
    """What a legend shows of them."""
    return [
        axes.plot([], [], linestyle="none", label=label, **_style(number))[0] for number, label in enumerate(labels)
    ]


def _bar(test: SeedsTest) -> list[list[float]]:
    """The interval as matplotlib draws it: below and above the mean, in %."""
    return [[100 * (test.mean - test.ci95[0])], [100 * (test.ci95[1] - test.mean)]]


def save(figure: Figure, path: Path) -> None:
    """As SVG, the same bytes for the same figures."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llm2"}):
        image = io.BytesIO()
        figure.savefig(image, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    write_bytes(path, image.getvalue())
