"""Run a study: a step is a command of its own, is skipped when its result exists, and resumes as the command does."""

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

import yaml
from tqdm import tqdm

from experiments.commands import CONFIGS, MODULES
from experiments.study.config import StudyConfig, StudyStep
from llm2.common.config_file import as_dict, difference, load_config, read_values
from llm2.common.inputs import Digests, as_digests, change, digests, read_inputs
from llm2.common.keys import Mark, select_keys
from llm2.common.kinds import with_kind
from llm2.errors import UserError, as_user_error, quote

ALL = "all"  # in place of a step: all steps that have the key


@dataclass(frozen=True)
class Run:
    """One combination of the axes' values, and its folder."""

    values: dict[str, str]
    folder: Path


def runs(config: StudyConfig) -> list[Run]:
    """Every combination that is not skipped and that some step is for."""
    combinations = (dict(zip(config.axes, values, strict=True)) for values in product(*config.axes.values()))
    kept = [values for values in combinations if not any(_among(values, skipped) for skipped in config.skip)]
    planned = [Run(values, Path(config.output_dir, "-".join(values.values()))) for values in kept]
    return [one for one in planned if wanted_steps(config, one)]


def _among(values: Mapping[str, str], choice: Mapping[str, Sequence[str]]) -> bool:
    return all(values[axis] in allowed for axis, allowed in choice.items())


def check(config: StudyConfig, summary: bool = False) -> None:
    """Raises UserError where axes and steps do not fit together, or where a step is out of date (`check_done`)."""
    names = {ALL, *(step.name for step in config.steps)}
    for axis, values in config.axes.items():
        for value, overrides in values.items():
            if unknown := overrides.keys() - names:
                raise UserError(f"axes: {axis}: {value}: no step is called {min(unknown)!r}; found {sorted(names)}")
    choices = [(f"steps: {step.name}: only", step.only) for step in config.steps]
    for where, choice in [*choices, *(("skip", skipped) for skipped in config.skip)]:
        for axis, values in choice.items():
            if not set(values) <= config.axes.get(axis, {}).keys():
                raise UserError(f"{where}: expected values of an axis, found {axis}: {values}")
    compared = [axis for pair in config.compare for axis in (*pair.first, *pair.second)]
    curves = (config.curves.x, config.curves.panels) if config.curves else ()
    for axis in (config.over, config.across, *config.baseline, *compared, *curves):
        if axis is not None and axis not in config.axes:
            axes, keys = ", ".join(config.axes), "over, across, baseline, compare and curves"
            raise UserError(f"{keys}: expected axes, found {axis!r}; the axes are {axes}")
    for value in config.axes[config.curves.x] if config.curves else ():
        with as_user_error(f"curves: x: {config.curves.x}: expected numbers, found {quote(value)}"):
            float(value)
    for step in (*config.once, *config.steps):
        if step.command not in (None, *CONFIGS):
            raise UserError(f"{step.name}: command: found {step.command!r}, expected one of {', '.join(CONFIGS)}")
    before = Run({}, Path(config.output_dir))
    planned = [(one, step) for one in runs(config) for step in wanted_steps(config, one)]
    for one, step in [(before, step) for step in config.once] + planned:
        done_file(config, step, one)
        if step.command is not None:
            check_done(config, step, one, summary)


def check_done(config: StudyConfig, step: StudyStep, one: Run, summary: bool = False) -> None:
    """Raises UserError for a config with mistakes, and for a step that was done with other settings than the study's
    or with other contents of what it reads, such as a verifier that has been trained anew since.

    Compared are the keys of its config file and its overrides, except null, which the command resolves, and texts with
    names in braces: folders may have been moved.
    """
    names = names_of(config, one)
    wanted = load_config(CONFIGS[step.command], step.config, list(arguments(config, step, names)))
    values = with_kind(settings_as_written(config, step, names))
    compared = {key for key, value in values.items() if value is not None and "{" not in str(value)}
    done = done_file(config, step, one)
    earlier = read_config_of(step, done)
    ignored = (as_dict(wanted).keys() - compared) | select_keys(wanted, Mark.HOW).keys()
    way_out = "delete what this step wrote, or choose another output_dir"
    if earlier is not None and (changed := difference(earlier, wanted, ignored)):
        raise UserError(f"{done}: {changed} in the study; {way_out}")
    inputs = recorded_inputs(step, done)
    if inputs is None:
        return
    now = digests(wanted)
    gone = inputs.keys() - now.keys() if summary else ()  # results may be summarised without what made them
    if changed := change(inputs, now, gone):
        raise UserError(f"{done} is out of date: {changed}; {way_out}")


def read_config_of(step: StudyStep, done: Path) -> dict[str, Any] | None:
    """The config with which a step was done, where its command writes one."""
    if not done.exists():
        return None
    if step.command == "explore":
        return read_values(done).get("config")  # JSON is YAML
    record = done.with_name("config.yaml" if step.command == "evaluate" else f"{step.command}.yaml")
    return with_kind(read_values(record)) if record.exists() else None


def recorded_inputs(step: StudyStep, done: Path) -> Digests | None:
    """The digests of what a step read; None where it is not done, or where an older version of llm2 did it."""
    if not done.exists():
        return None
    if step.command in ("explore", "self-consistency"):
        return as_digests(read_values(done).get("inputs"), done)
    return read_inputs(done.parent)


def choose_values(config: StudyConfig, only: Sequence[str]) -> dict[str, list[str]]:
    """Axis -> values of texts AXIS=VALUE. Raises UserError for any other text."""
    choice = defaultdict(list)
    for text in only:
        axis, _, value = text.partition("=")
        if value not in config.axes.get(axis, {}):
            pairs = ", ".join(f"{axis}={value}" for axis, values in config.axes.items() for value in values)
            raise UserError(f"--only {quote(text)}: expected one of {pairs}")
        choice[axis].append(value)
    return choice


def run(config: StudyConfig, only: Sequence[str] = ()) -> None:
    """Run all steps that are not done, with `only` those of the runs with one of its values on each axis it names.

    Raises UserError with the log of the first step that fails, after all others.
    """
    check(config)
    choice = choose_values(config, only)
    planned, locks = [one for one in runs(config) if _among(one.values, choice)], defaultdict(Lock)
    before = Run({}, Path(config.output_dir))
    steps = [(before, config.once), *((one, wanted_steps(config, one)) for one in planned)]
    files = {done_file(config, step, one) for one, wanted in steps for step in wanted}  # runs may share a step
    earlier, failures = sum(path.exists() for path in files), []
    bar = tqdm(total=len(files), initial=earlier, desc="study", unit="step", smoothing=0, mininterval=0)

    def tracked(step: StudyStep, one: Run) -> str | None:
        failure = run_step(config, step, one)
        bar.update(sum(path.exists() for path in files) - bar.n)
        return failure

    with ThreadPoolExecutor(config.workers) as pool, bar:
        for failure in list(pool.map(lambda step: tracked(step, before), config.once)):
            if failure:
                raise UserError(failure)
        for failure in pool.map(lambda one: run_steps(config, one, locks, tracked), planned):
            failures += [failure] if failure else []
            bar.set_postfix_str(f"{len(failures)} runs failed" if failures else "")
    if failures:
        raise UserError(f"{len(failures)} of {len(planned)} runs failed; the first: {failures[0]}")


def run_steps(
    config: StudyConfig, one: Run, locks: Mapping[Path, Lock], run_one: Callable[[StudyStep, Run], str | None]
) -> str | None:
    """The steps of a run up to the first failure, which is returned."""
    for step in wanted_steps(config, one):
        with locks[done_file(config, step, one)]:  # runs that share a step wait for the first of them
            failure = run_one(step, one)
        if failure:
            return failure
    return None


def wanted_steps(config: StudyConfig, one: Run) -> list[StudyStep]:
    """The steps of a run: those that are for its values."""
    return [step for step in config.steps if _among(one.values, step.only)]


def run_step(config: StudyConfig, step: StudyStep, one: Run) -> str | None:
    """Run a step unless it is done; returns a sentence if it fails."""
    names, done = names_of(config, one), done_file(config, step, one)
    if done.exists():
        return None
    if step.command is None:
        return f"{step.name}: expected {done}, which another study writes, found nothing; run that study first"
    one.folder.mkdir(parents=True, exist_ok=True)
    log = one.folder / f"{step.name}.log"
    files = [] if step.config is None else [step.config]
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1) // config.workers)
    with log.open("w", encoding="utf-8") as file:
        status = subprocess.run(
            [sys.executable, "-m", MODULES[step.command], step.command, *files, *arguments(config, step, names)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        ).returncode
    return f"{step.command} ended with status {status}; its log is {log}" if status else None


def names_of(config: StudyConfig, one: Run) -> dict[str, str]:
    """What stands in braces in the steps of a run."""
    return {"study": config.output_dir, "run": str(one.folder), **one.values}


def done_file(config: StudyConfig, step: StudyStep, one: Run) -> Path:
    """The file that a step leaves."""
    return Path(fill(step, step.done, names_of(config, one)))


def fill(step: StudyStep, text: str, names: Mapping[str, str]) -> str:
    """A text of a step with its names in braces replaced. Raises UserError for an unknown placeholder."""
    with as_user_error(f"steps: {step.name}: {quote(text)}: expected only {', '.join(names)} in braces"):
        return text.format(**names)


def overrides(config: StudyConfig, step: StudyStep, names: Mapping[str, str]) -> dict[str, Any]:
    """Keys of a step: of the axes' values for all steps, its own (`set`), of the axes' values for this step."""
    chosen = [values[names[axis]] for axis, values in config.axes.items() if axis in names]
    keys = CONFIGS[step.command].__dataclass_fields__
    found = {key: value for each in chosen for key, value in with_kind(each.get(ALL, {})).items() if key in keys}
    found |= step.set
    for each in chosen:
        found |= each.get(step.name, {})
    return found


def settings_as_written(config: StudyConfig, step: StudyStep, names: Mapping[str, str]) -> dict[str, Any]:
    """Keys of a step's config file and of its overrides, with names in braces as they stand."""
    return (read_values(step.config) if step.config else {}) | overrides(config, step, names)


def arguments(config: StudyConfig, step: StudyStep, names: Mapping[str, str]) -> Iterator[str]:
    """The step's overrides as key=value, with names in braces replaced."""
    for key, value in overrides(config, step, names).items():
        if isinstance(value, str):
            yield f"{key}={fill(step, value, names)}"
            continue
        if isinstance(value, list):
            value = [fill(step, item, names) if isinstance(item, str) else item for item in value]
        text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
        yield f"{key}={text}"


def step_folders(config: StudyConfig, one: Run, steps: Sequence[StudyStep]) -> dict[str, Path]:
    """The folders in which the steps of a run have left their results, for those that are done."""
    files = {step.name: done_file(config, step, one) for step in steps}
    return {name: file.parent for name, file in files.items() if file.exists()}
