"""The config of a study, which is a file of experiments/studies/."""

from dataclasses import field
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from llm2.config import STRICT, Count

NESTED = ConfigDict(extra="forbid", strict=False, use_attribute_docstrings=True)  # a YAML file holds mappings


@dataclass(frozen=True, config=NESTED, kw_only=True)
class StudyStep:
    """One command of a study."""

    name: str
    """What axes and reports call it."""
    command: str | None = None
    """Command of `python -m llm2` or `experiments`; null: another study writes the file `done`."""
    config: str | None = None
    """Its config file."""
    set: dict[str, Any] = field(default_factory=dict)
    """Overrides of its keys; {study}, {run} and the axes' names in braces stand for folders and values."""
    done: str
    """File whose presence says that the step is done."""
    only: dict[str, list[str]] = field(default_factory=dict)
    """Values of axes with which the step is run; all when empty."""
    values: dict[str, str] = field(default_factory=dict)
    """For a step of `once`: values of axes under which its figures stand in the tables."""


@dataclass(frozen=True, config=NESTED, kw_only=True)
class StudyPlot:
    """What the plot of a study shows."""

    x: str
    """Figure of the table on the horizontal axis; {column} stands for greedy or sampling."""
    label: str
    """Text of that axis."""
    colour: str
    """Axis that the colours tell."""
    marker: str
    """Axis that the markers tell."""


@dataclass(frozen=True, config=NESTED, kw_only=True)
class StudyCurves:
    """Accuracy as curves over an axis whose values are numbers."""

    x: str
    """That axis."""
    panels: str | None = None
    """Axis whose values have a panel each; null: one panel."""


@dataclass(frozen=True, config=NESTED, kw_only=True)
class StudyPair:
    """Two values of some axes to be tested against each other."""

    first: dict[str, str]
    """Axis -> value of the runs that should be better."""
    second: dict[str, str]
    """Axis -> value of the runs that they are tested against."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class StudyConfig:
    """Run the same steps for every combination of some settings, and compare: one table, one plot."""

    output_dir: str
    """Folder of all runs; a study that was stopped goes on where it was."""
    report: str
    """Path, without its ending, of the table, the data and the plots."""
    once: tuple[StudyStep, ...] = ()
    """Steps before all runs, side by side."""
    axes: dict[str, dict[str, dict[str, dict[str, Any]]]]
    """Axis -> its values -> step -> overrides; every combination is a run, the last axis varies fastest."""
    skip: tuple[dict[str, list[str]], ...] = ()
    """Axis -> values; combinations of them are left out."""
    steps: tuple[StudyStep, ...]
    """Steps of a run."""
    over: str | None = "seed"
    """Axis whose values are averaged; null where nothing is."""
    baseline: dict[str, str] = field(default_factory=dict)
    """Axis -> value of the runs that the others are tested against; none when empty."""
    compare: tuple[StudyPair, ...] = ()
    """Further tests of one value of some axes against another, for all values of the other axes."""
    across: str | None = None
    """Axis whose values stand side by side, in one table for each way of decoding; null: one long table."""
    seen_problems: Annotated[int, Field(ge=0)] = 0
    """Number of leading problems used during development; the others then have a table of their own too."""
    columns: dict[str, str] = field(default_factory=dict)
    """Figures of training.json and metrics.json and their headings: columns of the table, with `across` tables."""
    correlate: tuple[str, ...] = ()
    """Figures whose correlation with the accuracy of each mode is reported, over all runs."""
    given: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Axis -> its values -> figures that were measured elsewhere."""
    plots: dict[str, StudyPlot] = field(default_factory=dict)
    """Name -> what REPORT_NAME.svg shows; when empty, REPORT.svg shows the rows with their intervals."""
    curves: StudyCurves | None = None
    """Axes of the curves that REPORT.svg then shows in place of the rows."""
    workers: Count = 1
    """Runs side by side; each gets an equal share of the CPU's threads."""
