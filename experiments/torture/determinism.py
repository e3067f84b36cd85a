"""Byte for byte: the files of explore, train, evaluate and pretrain over everything that must not change them.

Every run has one thread per process: sums of floats depend on their number. Training in several processes is left out:
it adds gradients in another order. Left out of the comparison: the keys of LEFT_OUT, which hold times, and what holds
the keys that were varied: config.yaml, train.yaml, begun.json and `config` in explore's report.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.robustness.commands import kill_once, last_words, settings, start
from tests.robustness.row import Row

LEFT_OUT = ("seconds", "tokens_per_second", "peak_rss_mib", "train_seconds", "peak_memory_mib")
LEFT_OUT += ("config", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
NOT_COMPARED = ("config.yaml", "train.yaml", "begun.json", "training_args.bin")  # the last holds the folder's name
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # the narrowest locale there is


@dataclass(frozen=True)
class Variation:
    """What differs from the first run of a command."""

    what: str
    environment: Mapping[str, str] = field(default_factory=dict)
    overrides: Mapping[str, object] = field(default_factory=dict)
    processes: int = 1
    killed: bool = False  # once it has written something, and then run again


@dataclass(frozen=True)
class Command:
    """A command whose output must be the same bytes under all variations."""

    name: str
    arguments: tuple[str, ...]
    output: str  # the key of its output, relative to a run's folder
    path: str
    unfinished: str  # a pattern of files that hold work to resume from
    variations: tuple[Variation, ...]


ANY = (
    Variation("the same again"),
    Variation("hash seed 1", {"PYTHONHASHSEED": "1"}),
    Variation("hash seed 2", {"PYTHONHASHSEED": "2"}),
    Variation("an ASCII locale", ASCII),
    Variation("killed, then resumed", killed=True),
)
SPREAD = (
    Variation("batch size 3", overrides={"batch_size": 3}),
    Variation("batch size 17", overrides={"batch_size": 17}),
    Variation("two processes", processes=2),
    Variation("two processes, killed, then resumed by one", processes=2, killed=True),
)


def commands(folder: Path, scale: float) -> list[Command]:
    """The second trains on the committed triplets, the third decodes with what the second wrote."""
    many = max(1, round(20 * scale))
    common = {"model": "testbed", "device": "cpu"}
    task = {**common, "task": "testbed", "limit": 2 * many + 2, "max_new_tokens": 120}
    train = {**common, "train_file": "dataset/testbed.jsonl", "limit": 16 * many + 8, "eval_share": 0.2}
    train |= {"global_batch_size": 4, "per_device_train_batch_size": 4, "num_train_epochs": 1.0}
    train |= {"kind": "lora", "lora_r": 4}
    evaluate = {**task, "verifier": folder / "train" / "0" / "verifier", "beta": 0.5, "num_samples": 3}
    evaluate |= {"modes": "[plain_greedy,guided_greedy,plain_sampling,guided_sampling]", "majority_at": "[1,3]"}
    pretrain = {"documents": 100 * many, "max_steps": 6 * many, "batch_size": 8, "save_steps": 3, "card_problems": 3}
    explored = ("explore", *settings(task))
    return [
        Command("explore", explored, "output", "triplets.jsonl", "*.partial/shard-*", ANY + SPREAD),
        Command(
            "train", ("train", *settings(train)), "output_dir", "verifier", "verifier/checkpoint-*/trainer_state*", ANY
        ),
        Command(
            "evaluate", ("evaluate", *settings(evaluate)), "output_dir", "results", "*/journal/shard-*", ANY + SPREAD
        ),
        Command(
            "pretrain", ("pretrain", *settings(pretrain)), "output_dir", "system1", "*/checkpoints/*/trainer_st*", ANY
        ),
    ]


def run(folder: Path, scale: float, only: tuple[str, ...] = ()) -> list[Row]:
    """Args: only: names of variations; all when empty."""
    rows = []
    for command in commands(folder, scale):
        failures, first = [], folder / command.name / "0"
        error = execute(command, Variation("the first"), first)
        expected = contents(first)
        chosen = [each for each in command.variations if not only or each.what in only]
        for number, variation in enumerate(chosen, start=1):
            place = folder / command.name / str(number)
            error = error or execute(command, variation, place)
            found = {} if error else contents(place)
            differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
            if error or differing:
                failures.append(f"{variation.what}: {error or ', '.join(differing)}")
            error = None
        same = f"{len(expected)} files, {sum(map(len, expected.values())):,} bytes"
        detail = "; ".join(failures) or f"{same}: {', '.join(each.what for each in chosen)}"
        rows.append(Row(f"{command.name} gives the same bytes", len(chosen), len(failures), detail))
    return rows


def execute(command: Command, variation: Variation, place: Path) -> str | None:
    """Run the command into a folder of its own; returns what went wrong."""
    shutil.rmtree(place, ignore_errors=True)
    arguments = [*command.arguments, *settings(variation.overrides), f"{command.output}={place / command.path}"]
    log = place.with_suffix(".log")

    def begin(processes: int):
        return start(arguments, log, processes, **{"PYTHONHASHSEED": "0", **variation.environment})

    if variation.killed and not kill_once(begin(variation.processes), lambda: has_work(place, command.unfinished)):
        return "ended before it could be killed"
    status = begin(1 if variation.killed else variation.processes).wait()
    return f"status {status}: {last_words(log)}" if status else None


def has_work(place: Path, pattern: str) -> bool:
    """Whether there is something to resume from: a checkpoint, or a journal with an entry behind its header."""
    return any("shard" not in path.name or path.read_bytes().count(b"\n") > 1 for path in place.glob(pattern))


def contents(place: Path) -> dict[str, bytes]:
    """The files to compare, by name, without what holds times and with the folder's name taken out."""
    files = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.is_dir() or path.name in NOT_COMPARED or "checkpoint-" in name or "runs/" in name:
            continue
        content = path.read_bytes().replace(str(place).encode(), b"FOLDER")
        files[name] = json.dumps(without_times(json.loads(content))).encode() if path.suffix == ".json" else content
    return files


def without_times(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in LEFT_OUT}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value
