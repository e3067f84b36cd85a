"""The results of a study: every run's figures, means over seeds with intervals, paired tests against a baseline.

Letters: S seeds, N problems.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from llm2.common.files import write_text
from llm2.common.jsonl import read_jsonl
from llm2.common.stats import SeedsTest, majority_curve, seeds_bootstrap
from llm2.config import Mode, StudyConfig, StudyStep
from llm2.errors import UserError
from llm2.evaluation.metrics import right_answer
from llm2.study.run import Run, runs, step_folders

TRAINING = ("eval_choice_quality", "eval_choice_beta", "eval_pair_accuracy")
TRAINING += ("trainable_parameters", "train_seconds", "peak_memory_mib")
COST = ("tokens_per_problem", "verifier_tokens_per_token")


@dataclass(frozen=True)
class Result:
    """What a run has left."""

    values: dict[str, str]  # of the axes
    figures: dict[str, float]  # of training.json and metrics.json
    problems: dict[str, np.ndarray]  # mode -> (N,) share or probability of a right answer


@dataclass(frozen=True)
class Row:
    """The runs that differ by their seed alone."""

    values: dict[str, str]
    seeds: int
    figures: dict[str, float]  # means over the seeds
    accuracies: dict[str, SeedsTest]  # mode -> mean and interval
    against_baseline: dict[str, SeedsTest]  # mode -> mean difference, interval and p; empty for the baseline itself


def results(config: StudyConfig) -> list[Result]:
    """Of all runs with at least one evaluation, and of the evaluations before all runs."""
    before = [Run({"once": step.name}, Path(config.output_dir)) for step in config.once]
    found = [read_result(config, one, [step]) for one, step in zip(before, config.once, strict=True)]
    found += [read_result(config, one, config.steps) for one in runs(config)]
    return [result for result in found if result.problems]


def read_result(config: StudyConfig, one: Run, steps: Sequence[StudyStep]) -> Result:
    """Empty where nothing is done yet."""
    given = (config.given.get(axis, {}).get(value, {}) for axis, value in one.values.items())
    figures: dict[str, float] = {name: number for figures in given for name, number in figures.items()}
    problems: dict[str, np.ndarray] = {}
    for folder in step_folders(config, one, steps).values():
        if (folder / "training.json").exists():
            training = json.loads((folder / "training.json").read_text())
            figures |= {key: training[key] for key in TRAINING if key in training}
        if (folder / "metrics.json").exists():
            metrics = json.loads((folder / "metrics.json").read_text())
            for mode, values in metrics["modes"].items():
                figures |= {f"{mode}_{key}": values[key] for key in COST if key in values}
            problems |= read_problems(folder / "predictions.jsonl")
    return Result(one.values, figures, problems)


def read_problems(path: Path) -> dict[str, np.ndarray]:
    """Mode -> for each problem whether the greedy answer is right, or the probability that all samples' vote is."""
    shares: dict[str, list[float]] = {}
    for _, line in read_jsonl(path, "predictions"):
        answers = [sample["answer"] for sample in line["samples"]]
        if Mode(line["mode"]).sampled:
            share = majority_curve(answers, right_answer(line))[-1]
        else:
            share = float(line["samples"][0]["correct"])
        shares.setdefault(line["mode"], []).append(share)
    return {mode: np.array(values) for mode, values in shares.items()}


def rows(config: StudyConfig, found: Sequence[Result]) -> list[Row]:
    """One for all runs that differ by `config.over` alone, in the order of the runs."""
    groups: dict[tuple, list[Result]] = {}
    for result in found:
        groups.setdefault(_group(config, result.values), []).append(result)
    summary = []
    for key, members in groups.items():
        baseline = groups.get(_group(config, {**members[0].values, **config.baseline}), [])
        by_seed = {result.values.get(config.over): result for result in baseline}
        accuracies, against = {}, {}
        for mode in members[0].problems:
            values = [result.problems[mode] for result in members if mode in result.problems]
            accuracies[mode] = seeds_bootstrap(np.array(values))
            pairs = [(result, by_seed.get(result.values.get(config.over))) for result in members]
            differences = [
                one.problems[mode] - other.problems[mode]
                for one, other in pairs
                if other is not None and other is not one and mode in one.problems and mode in other.problems
            ]
            if differences:
                against[mode] = seeds_bootstrap(np.array(differences))
        names = dict.fromkeys(name for result in members for name in result.figures)
        figures = {
            name: float(np.mean([result.figures[name] for result in members if name in result.figures]))
            for name in names
        }
        summary.append(Row(dict(key), len(members), figures, accuracies, against))
    return summary


def _group(config: StudyConfig, values: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((axis, value) for axis, value in values.items() if axis != config.over)


def table(config: StudyConfig, summary: Sequence[Row]) -> str:
    """Markdown: a line for each row, accuracies in % with 95 % intervals, p against the baseline."""
    axes = [axis for axis in config.axes if axis != config.over]
    modes = list(dict.fromkeys(mode for row in summary for mode in row.accuracies))
    seeds = [] if config.over is None else [f"{config.over}s"]
    lines = [[*axes, *seeds, *(f"{_heading(mode)}, %" for mode in modes), *config.columns.values()]]
    for row in summary:
        labels = [row.values.get(axis, row.values.get("once", "") if axis == axes[-1] else "") for axis in axes]
        cells = [_accuracy(row, mode) for mode in modes]
        numbers = [_number(row.figures.get(name)) for name in config.columns]
        lines.append([*labels, *[str(row.seeds)] * len(seeds), *cells, *numbers])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in padded) + "\n"


def _heading(mode: str) -> str:
    return mode.replace("_", " ") + (" (majority of all samples)" if Mode(mode).sampled else "")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def correlations(config: StudyConfig, found: Sequence[Result]) -> list[str]:
    """A sentence for each figure of `correlate` and each mode that at least three runs have."""
    sentences = []
    for name in config.correlate:
        for mode in dict.fromkeys(mode for result in found for mode in result.problems):
            pairs = [
                (r.figures[name], r.problems[mode].mean()) for r in found if name in r.figures and mode in r.problems
            ]
            if len(pairs) >= 3:
                spearman, pearson = (
                    stats.spearmanr(pairs).statistic,
                    stats.pearsonr(*zip(*pairs, strict=True)).statistic,
                )
                sentences.append(
                    f"{name} and {mode} over {len(pairs)} runs: Spearman {spearman:.2f}, Pearson {pearson:.2f}"
                )
    return sentences


def _accuracy(row: Row, mode: str) -> str:
    if mode not in row.accuracies:
        return ""
    test = row.accuracies[mode]
    text = f"{100 * test.mean:.1f} [{100 * test.ci95[0]:.1f}, {100 * test.ci95[1]:.1f}]"
    against = row.against_baseline.get(mode)
    return text if against is None else f"{text}; {100 * against.mean:+.1f}, p = {against.p:.2g}"


def as_json(summary: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain values."""
    return [
        {
            **row.values,
            "seeds": row.seeds,
            **row.figures,
            "accuracy": {mode: test._asdict() for mode, test in row.accuracies.items()},
            "against_baseline": {mode: test._asdict() for mode, test in row.against_baseline.items()},
        }
        for row in summary
    ]


def write_summary(config: StudyConfig) -> str:
    """Write the table, the data and the plots; returns the table."""
    found = results(config)
    summary = rows(config, found)
    if not summary:
        raise UserError(f"{config.output_dir}: expected evaluations, found none that is done")
    path = Path(config.report)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join([table(config, summary).strip(), *correlations(config, found)]) + "\n"
    write_text(path.with_suffix(".md"), text)
    write_text(path.with_suffix(".json"), json.dumps(as_json(summary), indent=1) + "\n")
    if config.plots:
        from llm2.study.plot import draw, save  # matplotlib is an extra

        for name, plot in config.plots.items():
            save(draw(config, plot, summary), path.with_name(f"{path.name}_{name}.svg"))
    return text
