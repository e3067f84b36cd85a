"""The predictions of a results folder: a journal during the run, then config.yaml, inputs.json, predictions.jsonl and
traces.jsonl.

A journal entry holds one problem in one mode: a line of predictions.jsonl, plus `traces`.
"""

import json
import shutil
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path

from llm2.common.config_file import as_dict, difference, read_values, write_config
from llm2.common.distributed import barrier, dist_info
from llm2.common.files import whole_file
from llm2.common.inputs import INPUTS, Digests, change, read_inputs, require_same, write_inputs
from llm2.common.journal import Journal
from llm2.common.jsonl import read_jsonl
from llm2.common.keys import Mark, select_keys
from llm2.config import EvaluateConfig, Mode
from llm2.errors import UserError
from llm2.tasks import Problem


class Predictions:
    """Writes the predictions of this process; the main process publishes those of all processes.

    All processes agree on which predictions are missing, since each opens the journal before any of them writes to it.

    Args:
        inputs: digests of the run's inputs; raises UserError if earlier predictions were made with others.
    """

    def __init__(self, config: EvaluateConfig, inputs: Digests) -> None:
        self.config, self.inputs, self.folder = config, inputs, Path(config.output_dir)
        if dist_info().is_main:
            if not config.resume:
                self._delete_files()
            elif (self.folder / "predictions.jsonl").exists():
                way_out = "choose another output_dir, or pass resume=false to start over"
                self._require_same(self.folder, way_out)
            begun = (self.folder / "journal").exists()
            self.journal = self._open_journal()
            try:
                self._add_earlier_predictions()
            except UserError:
                if not begun:  # the next try may have another config
                    self.journal.discard()
                raise
        barrier()
        if not dist_info().is_main:
            self.journal = self._open_journal()
        barrier()
        self.done_before = frozenset(self.journal.done)

    def missing(self, problems: Sequence[Problem], mode: Mode) -> list[Problem]:
        """The problems that had no prediction when the run started, in order."""
        return [problem for problem in problems if (problem.id, mode) not in self.done_before]

    def count_correct(self, problems: Sequence[Problem], mode: Mode) -> tuple[int, int]:
        """Numbers of correct samples and of all samples of this mode when the run started."""
        keys = [(problem.id, mode) for problem in problems if (problem.id, mode) in self.done_before]
        correct = [sample["correct"] for entry in self.journal.read(keys) for sample in entry["samples"]]
        return sum(correct), len(correct)

    def add(self, entry: dict) -> None:
        self.journal.add(entry)

    def publish(self, problems: Sequence[Problem], modes: Sequence[Mode]) -> dict[Mode, list[dict]]:
        """Write config, digests and predictions, delete the journal; return the lines of each mode in order.

        Modes of earlier runs are included if they cover these problems.
        """
        lines = {mode: [] for mode in Mode if mode in modes or not self.missing(problems, mode)}
        keys = [(problem.id, mode) for mode in lines for problem in problems]
        others = sorted(self.done_before - set(keys))  # other problems and incomplete modes, kept for a later run
        write_config(self.config, self.folder / "config.yaml")
        write_inputs(self.folder, self.inputs)
        texts, details = self.folder / "predictions.jsonl", self.folder / "traces.jsonl"
        with whole_file(texts) as predictions, whole_file(details) as traces:
            for index, entry in enumerate(self.journal.read([*keys, *others])):
                predictions.write(_json_line({key: value for key, value in entry.items() if key != "traces"}))
                traces.write(_json_line({key: entry[key] for key in ("id", "mode", "traces")}))
                if index < len(keys):
                    lines[entry["mode"]].append(entry)
        self.journal.discard()
        return lines

    def _open_journal(self) -> Journal:
        shard = dist_info().rank
        return Journal(self.folder / "journal", self.config, self.inputs, key=_key, shard=shard)

    def _delete_files(self) -> None:
        shutil.rmtree(self.folder / "journal", ignore_errors=True)
        for name in ("predictions.jsonl", "traces.jsonl", "metrics.json", INPUTS):
            (self.folder / name).unlink(missing_ok=True)

    def _add_earlier_predictions(self) -> None:
        """Add the predictions of earlier runs to the journal."""
        for entries in (_read_entries(self.folder), *map(self._read_reusable, map(Path, self.config.reuse_from))):
            for entry in entries:
                if _key(entry) not in self.journal.done:
                    self.journal.add(entry)

    def _read_reusable(self, folder: Path) -> Iterator[dict]:
        """The entries of another results folder, but for modes that this run's settings would change. Raises UserError
        if they would change all that it holds of this run's modes."""
        if not (folder / "predictions.jsonl").exists():
            raise UserError(f"reuse_from: {folder} holds no predictions.jsonl; evaluate there first")
        scoring, refusals = select_keys(self.config, Mark.SCORES), {}  # refusals: mode -> why it does not agree
        others = as_dict(self.config).keys() - scoring
        same_scores = difference(read_values(folder / "config.yaml"), self.config, others) is None
        same_scores &= change(read_inputs(folder), self.inputs, others) is None
        for entry in _read_entries(folder):
            mode = Mode(entry["mode"])
            if mode not in refusals:
                refusals[mode] = self._refusal(folder, mode)
            if refusals[mode] is not None:
                continue
            kept = entry if same_scores else _without_scores(entry)
            scored = mode.sampled and self.config.score_samples and self.config.verifier is not None
            if scored and any(sample["score"] is None for sample in kept["samples"]):
                raise UserError(
                    f"score_samples: the samples in {folder} have no scores of this verifier for best of k and "
                    "weighted votes; expected score_samples=false, or no reuse_from"
                )
            yield kept
        wanted = [refusal for mode, refusal in refusals.items() if mode in self.config.modes] or [*refusals.values()]
        if wanted and None not in wanted:
            raise wanted[0]

    def _refusal(self, folder: Path, mode: Mode) -> UserError | None:
        try:
            self._require_same(folder, "it cannot be reused", _without_effect(self.config, mode))
        except UserError as error:
            return error

    def _require_same(self, folder: Path, way_out: str, but: Collection[str] = ()) -> None:
        earlier = read_values(folder / "config.yaml") | {"inputs": read_inputs(folder)}
        require_same(earlier, self.config, self.inputs, str(folder / "predictions.jsonl"), way_out, but)


def read_mode(folder: Path, mode: Mode) -> list[dict]:
    """The lines of a mode that the folder's metrics are of; those of more problems, of earlier runs, follow them."""
    metrics = folder / "metrics.json"
    n = json.loads(metrics.read_text(encoding="utf-8")).get("n") if metrics.exists() else None
    lines = (line for _, line in read_jsonl(folder / "predictions.jsonl", "predictions") if line["mode"] == mode)
    return [*islice(lines, n)]


def _without_effect(config: EvaluateConfig, mode: Mode) -> Collection[str]:
    """The keys that do not affect this mode's predictions."""
    used = {Mark.GUIDED: mode.guided, Mark.SAMPLED: mode.sampled, Mark.SEARCHED: mode.searched}
    marked, counting = (select_keys(config, *marks) for marks in (used, [mark for mark in used if used[mark]]))
    return marked.keys() - counting.keys()


def _key(entry: dict) -> tuple[str, str]:
    return entry["id"], entry["mode"]


def _json_line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _read_entries(folder: Path) -> Iterator[dict]:
    """The entries of a results folder; a killed run of an older version may have left torn last lines."""
    traces = {_key(line): line["traces"] for line in _whole_lines(folder / "traces.jsonl")}
    for entry in _whole_lines(folder / "predictions.jsonl"):
        yield {**entry, "traces": traces.get(_key(entry), [])}


def _whole_lines(path: Path) -> Iterator[dict]:
    if path.exists():
        yield from (record for _, record in read_jsonl(path, "predictions", skip_torn_line=True))


def _without_scores(entry: dict) -> dict:
    samples = [{**sample, "score": None} for sample in entry["samples"]]
    traces = [{**trace, "scores": None} for trace in entry["traces"]]
    return {**entry, "samples": samples, "traces": traces}
