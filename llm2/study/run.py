"""Run a study: a step is a command of its own, is skipped when its result exists, and resumes as the command does."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from llm2.common.config_file import load_config
from llm2.config import CONFIGS, StudyConfig, StudyStep
from llm2.errors import UserError, explained, shown


@dataclass(frozen=True)
class Run:
    """One combination of the axes' values, and its folder."""

    values: dict[str, str]
    folder: Path


def runs(config: StudyConfig) -> list[Run]:
    """Every combination that is not skipped."""
    combinations = (dict(zip(config.axes, values, strict=True)) for values in product(*config.axes.values()))
    kept = [values for values in combinations if not any(skipped.items() <= values.items() for skipped in config.skip)]
    return [Run(values, Path(config.output_dir, "-".join(values.values()))) for values in kept]


def check(config: StudyConfig) -> None:
    """Raises UserError where axes and steps do not fit together."""
    names = {step.name for step in config.steps}
    for axis, values in config.axes.items():
        for value, overrides in values.items():
            if unknown := overrides.keys() - names:
                raise UserError(f"axes: {axis}: {value}: no step is called {min(unknown)!r}; found {sorted(names)}")
    for step in config.steps:
        for axis, wanted in step.only.items():
            if not set(map(str, wanted)) <= config.axes.get(axis, {}).keys():
                raise UserError(f"steps: {step.name}: only: expected values of an axis, found {axis}: {wanted}")
    for axis in (config.over, *config.baseline):
        if axis is not None and axis not in config.axes:
            raise UserError(f"over and baseline: expected axes, found {axis!r}; the axes are {', '.join(config.axes)}")
    alone = Run({}, Path(config.output_dir))
    for one, step in [(alone, step) for step in config.once] + [(r, s) for r in runs(config) for s in config.steps]:
        if step.command not in CONFIGS:
            raise UserError(f"{step.name}: command: found {step.command!r}, expected one of {', '.join(CONFIGS)}")
        filled(step, step.done, names_of(config, one))
        load_config(CONFIGS[step.command], step.config, list(arguments(config, step, names_of(config, one))))


def run(config: StudyConfig) -> None:
    """Run all steps that are not done. Raises UserError with the log of the first that fails, after all others."""
    check(config)
    for step in config.once:
        if failure := run_step(config, step, Run({}, Path(config.output_dir))):
            raise UserError(failure)
    planned = runs(config)
    with ThreadPoolExecutor(config.workers) as pool, tqdm(total=len(planned), desc="study", unit="run") as bar:
        failures = []
        for failure in pool.map(lambda one: run_steps(config, one), planned):
            failures += [failure] if failure else []
            bar.set_postfix_str(f"{len(failures)} failed" if failures else "", refresh=False)
            bar.update()
    if failures:
        raise UserError(f"{len(failures)} of {len(planned)} runs failed; the first: {failures[0]}")


def run_steps(config: StudyConfig, one: Run) -> str | None:
    """The steps of a run up to the first failure, which is returned."""
    for step in config.steps:
        wanted = all(one.values[axis] in map(str, values) for axis, values in step.only.items())
        if wanted and (failure := run_step(config, step, one)):
            return failure
    return None


def run_step(config: StudyConfig, step: StudyStep, one: Run) -> str | None:
    """Run a step unless it is done; returns a sentence if it fails."""
    names = names_of(config, one)
    if Path(filled(step, step.done, names)).exists():
        return None
    one.folder.mkdir(parents=True, exist_ok=True)
    log = one.folder / f"{step.name}.log"
    files = [] if step.config is None else [step.config]
    threads = max(1, (os.cpu_count() or 1) // config.workers)
    with log.open("w") as file:
        status = subprocess.run(
            [sys.executable, "-m", "llm2", step.command, *files, *arguments(config, step, names)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        ).returncode
    return f"{step.command} ended with status {status}; its log is {log}" if status else None


def names_of(config: StudyConfig, one: Run) -> dict[str, str]:
    """What stands in braces in the steps of a run."""
    return {"study": config.output_dir, "run": str(one.folder), **one.values}


def filled(step: StudyStep, text: str, names: Mapping[str, str]) -> str:
    """A text of a step with its names in braces replaced. Raises UserError for one that nothing stands for."""
    with explained(f"steps: {step.name}: {shown(text)}: expected only {', '.join(names)} in braces"):
        return text.format(**names)


def arguments(config: StudyConfig, step: StudyStep, names: Mapping[str, str]) -> Iterator[str]:
    """key=value for a step's own overrides and those of the axes' values."""
    overrides: dict[str, Any] = dict(step.set)
    for axis, values in config.axes.items():
        if axis in names:
            overrides |= values[names[axis]].get(step.name, {})
    for key, value in overrides.items():
        if isinstance(value, str):
            yield f"{key}={filled(step, value, names)}"
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
            yield f"{key}={text}"


def step_folders(config: StudyConfig, one: Run, steps: Sequence[StudyStep]) -> dict[str, Path]:
    """The folders in which the steps of a run have left their results, for those that are done."""
    names = names_of(config, one)
    files = {step.name: Path(filled(step, step.done, names)) for step in steps}
    return {name: file.parent for name, file in files.items() if file.exists()}
