"""The predictions of a results folder: a journal while the evaluation runs, predictions.jsonl and traces.jsonl after.

Knows which settings a prediction depends on, so that no prediction of other settings is ever mixed in. Leaves making
them to `evaluation` and reading them for people to `report`.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from accelerate import PartialState

from llm2.common.config_file import difference, read_values, write_config
from llm2.common.journal import Journal
from llm2.config import EvaluateConfig
from llm2.errors import UserError
from llm2.tasks import Problem

# What may differ between a run and its continuation.
FREE = (
    "output_dir",
    "modes",
    "limit",
    "majority_at",
    "batch_size",
    "traced_samples",
    "take_over",
    "resume",
    "device",
)
GUIDANCE = ("verifier", "alpha", "beta", "top_k")  # what plain decoding does not depend on
DRAWING = ("samples", "temperature", "top_p", "seed")  # what greedy decoding does not depend on
MODES = ("plain_greedy", "guided_greedy", "plain_sampling", "guided_sampling")


class Predictions:
    """The predictions that one process makes, and in the main process all of them.

    Entries are lines of predictions.jsonl, one a problem and mode, with `traces` besides. All processes agree on what
    is missing: they open the journal before any of them writes.
    """

    def __init__(self, config: EvaluateConfig, processes: PartialState) -> None:
        self.config, self.folder = config, Path(config.output_dir)
        self.file = self.folder / "predictions.jsonl"
        self.view: TextIO | None = None
        with processes.main_process_first():
            if processes.is_main_process:
                self._forget() if not config.resume else self._refuse_other(self.folder, FREE)
            self.journal = Journal(
                self.folder / "journal", config, may_differ=FREE, key=_key, shard=processes.process_index
            )
            if processes.is_main_process:
                self._take_over()
        processes.wait_for_everyone()
        self.begun = frozenset(self.journal.done)

    def missing(self, problems: Sequence[Problem], mode: str) -> list[Problem]:
        """Those without a prediction when the run was begun, in order."""
        return [problem for problem in problems if (problem.id, mode) not in self.begun]

    def grades(self, problems: Sequence[Problem], mode: str) -> tuple[int, int]:
        """Correct samples and all samples of this mode when the run was begun."""
        keys = [(problem.id, mode) for problem in problems if (problem.id, mode) in self.begun]
        grades = [sample["correct"] for entry in self.journal.read(keys) for sample in entry["samples"]]
        return sum(grades), len(grades)

    def add(self, entry: dict) -> None:
        self.journal.add(entry)
        if self.view:
            self.view.write(_line(entry))
            self.view.flush()

    def publish(self, problems: Sequence[Problem], modes: Sequence[str]) -> dict[str, list[dict]]:
        """Write predictions.jsonl and traces.jsonl, drop the journal; each mode's lines, in the problems' order.

        Modes of earlier runs that cover these problems are among them.
        """
        modes = [mode for mode in MODES if mode in modes or not self.missing(problems, mode)]
        keys = [(problem.id, mode) for mode in modes for problem in problems]
        others = sorted(self.begun - set(keys))  # of other problems or of a part of a mode: kept for a later run
        lines: dict[str, list[dict]] = {mode: [] for mode in modes}
        new = [self.folder / "predictions.jsonl.new", self.folder / "traces.jsonl.new"]
        with new[0].open("w", encoding="utf-8") as predictions, new[1].open("w", encoding="utf-8") as traces:
            for index, entry in enumerate(self.journal.read([*keys, *others])):
                predictions.write(_line(entry))
                traces.write(
                    json.dumps({key: entry[key] for key in ("id", "mode", "traces")}, ensure_ascii=False) + "\n"
                )
                if index < len(keys):
                    lines[entry["mode"]].append(entry)
        self.view.close()
        for path in new:
            os.replace(path, path.with_suffix(""))
        self.journal.discard()
        return lines

    def _forget(self) -> None:
        shutil.rmtree(self.folder / "journal", ignore_errors=True)
        for name in ("predictions.jsonl", "traces.jsonl", "metrics.json"):
            (self.folder / name).unlink(missing_ok=True)

    def _take_over(self) -> None:
        """Fill the journal from earlier runs; begin predictions.jsonl, from now on a view of it, with what is there."""
        for folder in (self.folder, *map(Path, self.config.reuse_from)):
            for entry in self._earlier(folder):
                if _key(entry) not in self.journal.done:
                    self.journal.add(entry)
        write_config(self.config, self.folder / "config.yaml")
        self.view = self.file.open("w", encoding="utf-8")
        self.view.writelines(map(_line, self.journal.read(sorted(self.journal.done))))
        self.view.flush()

    def _earlier(self, folder: Path) -> Iterator[dict]:
        """The entries of a results folder; those of another folder only if every one holds for this config."""
        file = folder / "predictions.jsonl"
        if not file.exists():
            if folder != self.folder:
                raise UserError(f"take_over: {folder} holds no predictions.jsonl; evaluate there first")
            return
        traces = _read_traces(folder / "traces.jsonl")
        scored_by = read_values(folder / "config.yaml").get("verifier")
        for entry in _whole_lines(file):
            entry["traces"] = traces.get(_key(entry), [])
            if folder != self.folder:
                self._refuse_other(folder, (*FREE, *_without_effect(entry["mode"])))
                if scored_by != self.config.verifier:
                    _drop_scores(entry)
            yield entry

    def _refuse_other(self, folder: Path, may_differ: tuple[str, ...]) -> None:
        if not (folder / "predictions.jsonl").exists():
            return
        if change := difference(read_values(folder / "config.yaml"), self.config, may_differ):
            way_out = "choose another output_dir, or pass resume=false to begin anew"
            if folder != self.folder:
                way_out = "it cannot be taken over"
            raise UserError(f"{folder / 'predictions.jsonl'} was made with another config: {change}; {way_out}")


def _without_effect(mode: str) -> tuple[str, ...]:
    """The settings that what this mode writes does not depend on."""
    guidance = (*GUIDANCE, "score_samples", "solution_score") if mode.startswith("plain") else ()
    return guidance + (DRAWING if mode.endswith("greedy") else ())


def _key(entry: dict) -> tuple[str, str]:
    return entry["id"], entry["mode"]


def _line(entry: dict) -> str:
    """As it stands in predictions.jsonl."""
    return json.dumps({key: value for key, value in entry.items() if key != "traces"}, ensure_ascii=False) + "\n"


def _whole_lines(file: Path) -> Iterator[dict]:
    """But for a last line that a kill cut off."""
    with file.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.endswith("\n"))


def _read_traces(path: Path) -> dict[tuple[str, str], list[dict]]:
    if not path.exists():
        return {}
    return {_key(line): line["traces"] for line in _whole_lines(path)}


def _drop_scores(entry: dict) -> None:
    """Another verifier's scores say nothing here."""
    for sample in entry["samples"]:
        sample["score"] = None
    for trace in entry["traces"]:
        trace["scores"] = None
