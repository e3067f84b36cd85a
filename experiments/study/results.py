"""What the runs of a study have left: here, and in REPORT.runs.jsonl, where a summary publishes every run's outcomes.

With the published runs a study can be extended where its folders are not: what was not run here is taken from them, and
new runs are paired with them problem by problem.

A run that decodes plainly and a guided one stand in one column, `greedy` or `sampling`: they are ways to the same end.
Only where a run of the study has both do the columns keep the modes' names.

Letters: N problems.
"""

import hashlib
import json
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.study.config import StudyConfig, StudyStep
from experiments.study.run import Run, names_of, runs, settings_as_written, step_folders, wanted_steps
from experiments.testbed.regimes import FORMER_NAMES
from llm2.common.files import write_text
from llm2.common.jsonl import read_jsonl
from llm2.common.kinds import KINDS, with_kind
from llm2.common.stats import best_of_k, majority_curve
from llm2.config import Mode
from llm2.errors import as_user_error
from llm2.evaluation.metrics import ranking, right_answer, voting
from llm2.evaluation.predictions import read_mode

TRAINING = ("eval_choice_quality", "eval_choice_beta", "eval_pair_accuracy", "eval_margin_spearman")
TRAINING += ("eval_benign_suppressed", "eval_harmful_suppressed")
TRAINING += ("trainable_parameters", "train_seconds", "peak_memory_mib")
ENDS = ("greedy", "sampling", "search")
COST = ("tokens_per_problem", "verifier_tokens_per_token")


@dataclass(frozen=True)
class Result:
    """What a run has left."""

    values: dict[str, str]  # of the axes
    settings: str  # digest of what its steps were asked for
    figures: dict[str, float]  # of training.json and metrics.json
    problems: dict[str, np.ndarray]  # column -> (N,) share or probability of a right answer


def results(config: StudyConfig) -> list[Result]:
    """Of all runs with at least one evaluation, and of the evaluations before all runs."""
    before = [(Run(step.values, Path(config.output_dir)), [step]) for step in config.once]
    planned = before + [(one, wanted_steps(config, one)) for one in runs(config)]
    earlier = read_published(config)
    found = [add_published(read_result(config, one, steps), earlier) for one, steps in planned]
    return [result for result in found if result.problems]


def in_one_column(found: Sequence[Result]) -> list[Result]:
    """The results with `greedy` and `sampling` for the modes' names, unless a run has both modes."""
    both = {end for result in found for end in ENDS if {f"plain {end}", f"guided {end}"} <= result.problems.keys()}
    return [_rename(result, set(ENDS) - both) for result in found]


def _rename(result: Result, ends: Set[str]) -> Result:
    """Without the way in the names that begin with `plain END` or `guided END`."""

    def name(old: str) -> str:
        way, _, rest = old.partition(" ")
        return rest if way in ("plain", "guided") and rest.split(" ")[0] in ends else old

    figures, problems = (
        {name(key): value for key, value in each.items()} for each in (result.figures, result.problems)
    )
    return replace(result, figures=figures, problems=problems)


def read_result(config: StudyConfig, one: Run, steps: Sequence[StudyStep]) -> Result:
    """Empty where nothing is done yet."""
    given = (config.given.get(axis, {}).get(value, {}) for axis, value in one.values.items())
    figures: dict[str, float] = {name: number for figures in given for name, number in figures.items()}
    evaluations: dict[str, tuple[dict, Path]] = {}  # mode -> its metrics, and the folder
    for folder in step_folders(config, one, steps).values():
        if (folder / "training.json").exists():
            training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
            figures |= {key: training[key] for key in TRAINING if key in training}
        if (folder / "metrics.json").exists():
            modes = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["modes"]
            evaluations |= {mode: (values, folder) for mode, values in modes.items()}
    problems: dict[str, np.ndarray] = {}
    for mode, (values, folder) in evaluations.items():
        column = mode.replace("_", " ")
        figures |= {f"{column} {key}": values[key] for key in COST if key in values}
        problems |= {column + suffix: shares for suffix, shares in read_problems(folder, mode).items()}
    return Result(one.values, settings_of(config, one, steps), figures, problems)


def read_problems(folder: Path, mode: str) -> dict[str, np.ndarray]:
    """For each problem whether the greedy answer is right, or the probability that the vote of all samples is; under
    " best", where samples have scores, that of the best one."""
    shares: dict[str, list[float]] = {}
    for line in read_mode(folder, mode):
        correct = [sample["correct"] for sample in line["samples"]]
        if not Mode(mode).sampled:
            shares.setdefault("", []).append(float(correct[0]))
            continue
        shares.setdefault("", []).append(majority_curve(voting(line), right_answer(line))[-1])
        if None not in (scores := ranking(line)):
            shares.setdefault(" best", []).append(best_of_k(scores, correct, len(scores)))
    return {suffix: np.array(values) for suffix, values in shares.items()}


def settings_of(config: StudyConfig, one: Run, steps: Sequence[StudyStep]) -> str:
    """Digest of the keys of the steps' config files and overrides, names in braces as they stand."""
    names = names_of(config, one)
    settings = [
        (step.command, as_published(settings_as_written(config, step, names)))
        for step in steps
        if step.command is not None
    ]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def as_published(keys: dict[str, Any]) -> dict[str, Any]:
    """Keys and tasks as they were named when the first runs were published, whose digests are of those names."""
    keys = with_kind(keys)
    keys |= {key: FORMER_NAMES.get(keys[key], keys[key]) for key in ("task", "replay_task") if key in keys}
    if (kind := keys.pop("kind", None)) not in KINDS:
        return keys if kind is None else {**keys, "kind": kind}  # one that `train` refuses
    score, head, adapter = KINDS[kind]
    keys |= {} if kind == "lora" else {"score": score}  # nobody wrote `score: candidate` beside lora_r
    keys |= {"prefix_head": head} if head else {}
    return {"lora_r": 16, **keys} if adapter else keys


def publish(config: StudyConfig, found: Sequence[Result]) -> None:
    """Write a line for each run; the outcomes of greedy answers as one digit a problem."""

    def outcomes(shares: np.ndarray) -> str | list[float]:
        return "".join(f"{share:.0f}" for share in shares) if np.isin(shares, (0, 1)).all() else shares.tolist()

    lines = (asdict(one) | {"problems": {name: outcomes(each) for name, each in one.problems.items()}} for one in found)
    write_text(_path(config), "".join(f"{json.dumps(line)}\n" for line in lines))


def read_published(config: StudyConfig) -> list[Result]:
    """Raises UserError for a file that is not as `publish` writes it."""
    path, found = _path(config), []
    for number, line in read_jsonl(path, "runs") if path.exists() else ():
        with as_user_error(f"{path}, line {number}: expected a run as a study publishes it"):
            problems = {name: np.array([float(share) for share in each]) for name, each in line["problems"].items()}
            found.append(Result(**line | {"problems": problems}))
    return found


def add_published(here: Result, earlier: Sequence[Result]) -> Result:
    """The result, and what was published of the same run with the same settings, where it lacks something."""
    for one in earlier:
        if (one.values, one.settings) == (here.values, here.settings):
            return replace(here, figures=one.figures | here.figures, problems=one.problems | here.problems)
    return here


def _path(config: StudyConfig) -> Path:
    return Path(f"{config.report}.runs.jsonl")
