"""Pack the predictions and traces of a results folder into the data of page.js."""

import json
import sys
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from llm2.config import Mode
from llm2.evaluation.metrics import GREEDY, SAMPLING
from llm2.evaluation.report.read import Metrics, Prediction, Traces, read_lines


def pack(folder: Path, metrics: Metrics, max_bytes: int) -> tuple[str, int]:
    """The data as JSON that is safe within a script element, and how many samples it shows token by token.

    The JSON is {"modes", "compared": [plain, guided] or None, "beta", "vocabulary": [text], "scale": [low, middle,
    high] scores, "problems": [[id, question, gold, {mode: [sample]}]]}, where a sample is [answer, correct, tokens,
    score, text or trace or None] and a trace [[token], [score in hundredths], [[at, [candidate], [log-probability in
    hundredths], [score in hundredths], chosen, changed]]]; tokens and candidates are vocabulary indices.

    The first traces of all problems and modes are included if they fit into max_bytes, then the second ones, and so on.
    Without a trace, a mode's first text is included. Only included data is kept in memory.
    """
    problems, size = _read_predictions(folder, metrics)
    vocabulary = _Vocabulary()
    levels: list[dict[tuple[str, Mode], str]] = []  # of each sample that fits: problem and mode -> trace
    limit, scores = sys.maxsize, array("d")
    for line in read_lines(folder / "traces.jsonl", Traces):
        key = line["id"], Mode(line["mode"])
        if key[1] not in problems.get(key[0], (None, {}))[1]:
            continue
        for level, trace in enumerate(line["traces"]):
            scores.extend(trace["scores"] or ())
            if level < limit:
                if level == len(levels):
                    levels.append({})
                levels[level][key] = _as_json(_pack_trace(trace, vocabulary))
                size += len(levels[level][key])
            while size + vocabulary.size > max_bytes and levels:
                size -= sum(map(len, levels.pop().values()))
                limit = len(levels)
    lines = []
    for id, (head, modes) in problems.items():
        packed = []
        for mode, samples in modes.items():
            traces = (level.get((id, mode)) for level in levels)
            bodies = [trace or text for (_, text), trace in zip(samples, traces, strict=False)]
            bodies += [text for _, text in samples[len(bodies) :]]
            texts = [f"{sample},{body}]" for (sample, _), body in zip(samples, bodies, strict=True)]
            packed.append(f'"{mode}":[{",".join(texts)}]')
        lines.append(f"{head},{{{','.join(packed)}}}]")
    rest = {
        "modes": [mode for mode in Mode if mode in metrics.modes],
        "compared": next((pair for pair in (GREEDY, SAMPLING) if metrics.modes.keys() >= {*pair}), None),
        "beta": metrics.settings.get("beta"),
        "vocabulary": list(vocabulary),
        "scale": _scale(scores),
    }
    return f'{_as_json(rest)[:-1]},"problems":[{",".join(lines)}]}}', len(levels)


class _Vocabulary(dict[str, int]):
    """Text -> index, in the order of first use; `size` is the size of their JSON in bytes."""

    size = 0

    def __missing__(self, text: str) -> int:
        self[text] = index = len(self)
        self.size += len(_as_json(text).encode()) + 1
        return index


def _read_predictions(folder: Path, metrics: Metrics) -> tuple[dict[str, tuple[str, dict[Mode, list]]], int]:
    """Problem -> JSON of its head and, for each mode, of the head of each sample and of its text or null; and the bytes
    of all. Heads lack their closing bracket."""
    problems, size, counts = {}, 0, Counter()
    for line in read_lines(folder / "predictions.jsonl", Prediction):
        mode = Mode(line["mode"])
        counts[mode] += 1
        if mode not in metrics.modes or counts[mode] > metrics.n:  # of earlier runs, with more problems
            continue
        if line["id"] not in problems:
            problems[line["id"]] = _as_json([line["id"], line["question"], line["gold"]])[:-1], {}
            size += len(problems[line["id"]][0].encode()) + 4
        samples = [
            [each["answer"], int(each["correct"]), each["tokens"], each.get("score")] for each in line["samples"]
        ]
        texts = [_as_json(line["samples"][0]["text"])] + ["null"] * (len(samples) - 1)
        samples = [(_as_json(sample)[:-1], text) for sample, text in zip(samples, texts, strict=True)]
        problems[line["id"]][1][mode] = samples
        size += len(mode) + 6 + sum(len(sample.encode()) + len(text.encode()) + 3 for sample, text in samples)
    return problems, size


def _pack_trace(trace: dict, vocabulary: _Vocabulary) -> list:
    choices = [
        [
            choice["at"],
            [vocabulary[text] for text in choice["candidates"]],
            [_hundredths(value) for value in choice["logprobs"]],
            [_hundredths(value) for value in choice["scores"]],
            choice["chosen"],
            int(choice["changed"]),
        ]
        for choice in trace["choices"]
    ]
    scores = trace["scores"] and [_hundredths(score) for score in trace["scores"]]
    return [[vocabulary[text] for text in trace["tokens"]], scores, choices]


def _scale(scores: array) -> list[float]:
    """The 5th, 50th and 95th percentile of token scores: only differences between scores have a meaning."""
    return np.quantile(scores, (0.05, 0.5, 0.95), method="lower").tolist() if scores else [0, 0, 0]


def _hundredths(value: float) -> int:
    return round(100 * value)


def _as_json(value: Any) -> str:
    """JSON with `<` escaped, so that no text of a model can end the script element."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
