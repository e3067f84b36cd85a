"""The summary of a study: means over seeds with intervals, and paired tests."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from experiments.study.bootstrap import SeedsTest, seeds_bootstrap
from experiments.study.config import StudyConfig
from experiments.study.results import Result


@dataclass(frozen=True)
class Comparison:
    """Two values of some axes, all others being equal: first less second."""

    first: dict[str, str]
    second: dict[str, str]
    others: dict[str, str]  # values of the other axes
    differences: dict[str, SeedsTest]  # column -> mean difference, interval and p


@dataclass(frozen=True)
class Row:
    """The runs that differ by their seed alone."""

    values: dict[str, str]
    seeds: int
    figures: dict[str, float]  # means over the seeds
    accuracies: dict[str, SeedsTest]  # column -> mean and interval
    against_baseline: dict[str, SeedsTest]  # column -> mean difference, interval and p; empty for the baseline itself


def drop_seen(config: StudyConfig, found: Sequence[Result]) -> list[Result]:
    """The results on the problems behind the first `config.seen_problems`."""
    return [
        replace(result, problems={name: shares[config.seen_problems :] for name, shares in result.problems.items()})
        for result in found
    ]


def rows(config: StudyConfig, found: Sequence[Result]) -> list[Row]:
    """One for all runs that differ by `config.over` alone, in the order of the runs."""
    groups = group(config, found)
    summary = []
    for key, members in groups.items():
        baseline = groups.get(_key(config, {**dict(key), **config.baseline}), [])
        columns = dict.fromkeys(column for result in members for column in result.problems)
        values = {name: [one.problems[name] for one in members if name in one.problems] for name in columns}
        names = dict.fromkeys(name for result in members for name in result.figures)
        figures = {
            name: float(np.mean([result.figures[name] for result in members if name in result.figures]))
            for name in names
        }
        accuracies = {name: seeds_bootstrap(np.array(shares)) for name, shares in values.items()}
        summary.append(Row(dict(key), len(members), figures, accuracies, differences(config, members, baseline)))
    return summary


def group(config: StudyConfig, found: Sequence[Result]) -> dict[tuple, list[Result]]:
    """The runs that differ by `config.over` alone, by their other values."""
    groups: dict[tuple, list[Result]] = {}
    for result in found:
        groups.setdefault(_key(config, result.values), []).append(result)
    return groups


def differences(config: StudyConfig, members: Sequence[Result], baseline: Sequence[Result]) -> dict[str, SeedsTest]:
    """Column -> members less the baseline's runs of equal seeds; where it has one run, less that one."""
    by_seed = {result.values.get(config.over): result for result in baseline}
    alone = baseline[0] if len(baseline) == 1 else None
    tests = {}
    for column in dict.fromkeys(column for result in members for column in result.problems):
        pairs = ((one, by_seed.get(one.values.get(config.over), alone)) for one in members)
        values = [
            one.problems[column] - other.problems[column]
            for one, other in pairs
            if other not in (None, one) and column in one.problems and column in other.problems
        ]
        if values:
            tests[column] = seeds_bootstrap(np.array(values))
    return tests


def comparisons(config: StudyConfig, found: Sequence[Result]) -> list[Comparison]:
    """Each pair of `config.compare`, for all values of the other axes."""
    groups, compared = group(config, found), []
    for pair in config.compare:
        first, second = pair.first, pair.second
        for key, members in groups.items():
            values = dict(key)
            if first.items() <= values.items() and (other := groups.get(_key(config, {**values, **second}))):
                others = {axis: value for axis, value in values.items() if axis not in {*first, *second}}
                compared.append(Comparison(first, second, others, differences(config, members, other)))
    return compared


def _key(config: StudyConfig, values: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((axis, value) for axis, value in values.items() if axis != config.over)
