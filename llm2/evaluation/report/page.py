"""report.html: one file, without network, to look into every problem of a results folder.

Knows how predictions and traces are packed small enough for a browser, and fills page.html with them, page.css and
page.js. What is done with them there is page.js' business.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from llm2.evaluation.report.plots import as_svg
from llm2.evaluation.report.read import Metrics
from llm2.evaluation.report.table import HEADER, choice, cost_lines, notes, rows, settings, title

MOST_BYTES = 30_000_000  # of the page, by the issue of what a browser opens without lag
MODES = ("plain_greedy", "guided_greedy", "plain_sampling", "guided_sampling")


def write_page(folder: Path, metrics: Metrics, drawn: dict[str, Figure]) -> None:
    """Write FOLDER/report.html; the problems are in it where FOLDER holds predictions.jsonl."""
    here = Path(__file__).parent
    frame = Environment(loader=FileSystemLoader(here), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    charts = {name: Markup(as_svg(figure)) for name, figure in drawn.items()}
    used = sum(map(len, charts.values())) + sum((here / f"page.{end}").stat().st_size for end in ("css", "js", "html"))
    data, shown = fitting(folder, metrics, MOST_BYTES - 2 * used - 100_000)
    page = frame.get_template("page.html").render(
        title=title(metrics),
        settings=settings(metrics),
        choice=choice(metrics),
        metrics=metrics,
        header=HEADER,
        rows=[(row.group, row.cells(metrics.n)) for row in rows(metrics)],
        costs=cost_lines(metrics),
        notes=notes(metrics),
        charts=charts,
        shown=shown,
        css=Markup((here / "page.css").read_text(encoding="utf-8")),
        script=Markup((here / "page.js").read_text(encoding="utf-8")),
        data=Markup(data),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def fitting(folder: Path, metrics: Metrics, most_bytes: int) -> tuple[str, int]:
    """The packed problems as JSON that is safe within a script element, and how many samples a problem they show.

    As many samples of each sampling mode are shown token by token as there are traces of, and as fit.
    """
    lines = list(_read(folder / "predictions.jsonl"))
    traces = {(line["id"], line["mode"]): line["traces"] for line in _read(folder / "traces.jsonl")}
    most = max(map(len, traces.values()), default=0)
    for shown in range(most, -1, -1):
        packed = json.dumps(pack(lines, traces, metrics, shown), ensure_ascii=False, separators=(",", ":"))
        packed = packed.replace("<", "\\u003c")  # no text of a model may end the script element
        if len(packed.encode()) <= most_bytes:
            break
    return packed, shown


def pack(lines: list[dict], traces: dict, metrics: Metrics, shown: int) -> dict:
    """What page.js reads.

    Returns:
        {"modes", "beta", "vocabulary": [text], "scale": [low, middle, high] scores, "problems": [[id, question, gold,
        {mode: [sample]}]]}, a sample being [answer, right, tokens, score, text or trace or None] and a trace
        [[token], [score in hundredths], [[at, [candidate], [log-probability in hundredths], [score in hundredths],
        chosen, changed]]], tokens and candidates by their number in the vocabulary.
    """
    vocabulary: dict[str, int] = {}

    def number(text: str) -> int:
        return vocabulary.setdefault(text, len(vocabulary))

    def packed_trace(trace: dict) -> list:
        scores = trace["scores"] and [_hundredths(score) for score in trace["scores"]]
        choices = [
            [
                choice["at"],
                [number(text) for text in choice["candidates"]],
                [_hundredths(value) for value in choice["logprobs"]],
                [_hundredths(value) for value in choice["scores"]],
                choice["chosen"],
                int(choice["changed"]),
            ]
            for choice in trace["choices"]
        ]
        return [[number(text) for text in trace["tokens"]], scores, choices]

    problems: dict[str, list] = {}
    for line in lines:
        mode = line["mode"]
        if mode not in metrics.modes:
            continue
        own = traces.get((line["id"], mode), [])[: max(shown, mode.endswith("greedy"))]
        bodies = [packed_trace(trace) for trace in own] or [line["samples"][0]["text"]]
        bodies += [None] * (len(line["samples"]) - len(bodies))
        samples = [
            [sample["answer"], int(sample["correct"]), sample["tokens"], sample.get("score"), body]
            for sample, body in zip(line["samples"], bodies, strict=True)
        ]
        problems.setdefault(line["id"], [line["id"], line["question"], line["gold"], {}])[3][mode] = samples
    return {
        "modes": [mode for mode in MODES if mode in metrics.modes],
        "beta": metrics.settings.get("beta"),
        "vocabulary": list(vocabulary),
        "scale": _scale(traces),
        "problems": list(problems.values()),
    }


def _scale(traces: dict) -> list[float]:
    """The 5th, 50th and 95th of 100 token scores: a score has no zero of its own, only differences mean something."""
    scores = sorted(score for own in traces.values() for trace in own for score in trace["scores"] or [])
    return [scores[math.floor(share * (len(scores) - 1))] for share in (0.05, 0.5, 0.95)] if scores else [0, 0, 0]


def _hundredths(value: float) -> int:
    return round(100 * value)


def _read(path: Path) -> Iterator[dict]:
    """The lines of a file, none where there is no file."""
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)
