"""The results of a study: every run's figures, means over seeds with intervals, paired tests.

A run that decodes plainly and a guided one stand in one column, `greedy` or `sampling`: they are ways to the same end.
Only where a run of the study has both do the columns keep the modes' names.

Letters: S seeds, N problems.
"""

import json
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llm2.common.jsonl import read_jsonl
from llm2.common.stats import SeedsTest, best_of_k, majority_curve, seeds_bootstrap
from llm2.config import Mode
from llm2.evaluation.metrics import right_answer
from llm2.study.config import StudyConfig, StudyStep
from llm2.study.run import Run, runs, step_folders, wanted_steps

TRAINING = ("eval_choice_quality", "eval_choice_beta", "eval_pair_accuracy", "eval_margin_spearman")
TRAINING += ("eval_benign_suppressed", "eval_harmful_suppressed")
TRAINING += ("trainable_parameters", "train_seconds", "peak_memory_mib")
ENDS = ("greedy", "sampling")
COST = ("tokens_per_problem", "verifier_tokens_per_token")


@dataclass(frozen=True)
class Result:
    """What a run has left."""

    values: dict[str, str]  # of the axes
    figures: dict[str, float]  # of training.json and metrics.json
    problems: dict[str, np.ndarray]  # column -> (N,) share or probability of a right answer


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


def results(config: StudyConfig) -> list[Result]:
    """Of all runs with at least one evaluation, and of the evaluations before all runs."""
    before = [Run(step.values, Path(config.output_dir)) for step in config.once]
    found = [read_result(config, one, [step]) for one, step in zip(before, config.once, strict=True)]
    found += [read_result(config, one, wanted_steps(config, one)) for one in runs(config)]
    both = {end for result in found for end in ENDS if {f"plain {end}", f"guided {end}"} <= result.problems.keys()}
    return [_renamed(result, set(ENDS) - both) for result in found if result.problems]


def _renamed(result: Result, ends: Set[str]) -> Result:
    """Without the way in the names that begin with `plain END` or `guided END`."""

    def name(old: str) -> str:
        way, _, rest = old.partition(" ")
        return rest if way in ("plain", "guided") and rest.split(" ")[0] in ends else old

    figures, problems = (
        {name(key): value for key, value in each.items()} for each in (result.figures, result.problems)
    )
    return Result(result.values, figures, problems)


def read_result(config: StudyConfig, one: Run, steps: Sequence[StudyStep]) -> Result:
    """Empty where nothing is done yet."""
    given = (config.given.get(axis, {}).get(value, {}) for axis, value in one.values.items())
    figures: dict[str, float] = {name: number for figures in given for name, number in figures.items()}
    evaluations: dict[str, tuple[dict, Path]] = {}  # mode -> its metrics, and the predictions
    for folder in step_folders(config, one, steps).values():
        if (folder / "training.json").exists():
            training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
            figures |= {key: training[key] for key in TRAINING if key in training}
        if (folder / "metrics.json").exists():
            modes = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["modes"]
            evaluations |= {mode: (values, folder / "predictions.jsonl") for mode, values in modes.items()}
    problems: dict[str, np.ndarray] = {}
    for mode, (values, path) in evaluations.items():
        column = mode.replace("_", " ")
        figures |= {f"{column} {key}": values[key] for key in COST if key in values}
        problems |= {column + suffix: shares for suffix, shares in read_problems(path, mode).items()}
    return Result(one.values, figures, problems)


def read_problems(path: Path, mode: str) -> dict[str, np.ndarray]:
    """For each problem whether the greedy answer is right, or the probability that the vote of all samples is; under
    " best", where samples have scores, that of the best one."""
    shares: dict[str, list[float]] = {}
    for _, line in read_jsonl(path, "predictions"):
        samples = line["samples"]
        if line["mode"] != mode:
            continue
        correct = [sample["correct"] for sample in samples]
        if not Mode(mode).sampled:
            shares.setdefault("", []).append(float(correct[0]))
            continue
        vote = majority_curve([sample["answer"] for sample in samples], right_answer(line))[-1]
        shares.setdefault("", []).append(vote)
        scores = [sample.get("score") for sample in samples]
        if None not in scores:
            shares.setdefault(" best", []).append(best_of_k(scores, correct, len(scores)))
    return {suffix: np.array(values) for suffix, values in shares.items()}


def unseen(config: StudyConfig, found: Sequence[Result]) -> list[Result]:
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
