"""report.html: one file, without network, to look into every problem of a results folder.

Packs predictions and traces small enough for a browser and fills page.html with them, page.css and page.js.
"""

import json
import math
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from llm2.common.files import write_text
from llm2.common.jsonl import read_jsonl
from llm2.config import Mode
from llm2.errors import explained
from llm2.evaluation.metrics import GREEDY, SAMPLING
from llm2.evaluation.report.plots import as_svg
from llm2.evaluation.report.read import Metrics
from llm2.evaluation.report.table import HEADER, choice, cost_lines, notes, rows, settings, title

MAX_BYTES = 30_000_000  # a browser opens such a page without lag


def write_page(folder: Path, metrics: Metrics, plots: dict[str, Figure]) -> None:
    """Write FOLDER/report.html, with the problems if FOLDER holds predictions.jsonl."""
    source = Path(__file__).parent
    templates = Environment(loader=FileSystemLoader(source), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    charts = {name: Markup(as_svg(figure)) for name, figure in plots.items()}
    used = sum(map(len, charts.values())) + sum(path.stat().st_size for path in source.glob("page.*"))
    data, shown = fitting(folder, metrics, MAX_BYTES - 2 * used - 100_000)
    page = templates.get_template("page.html").render(
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
        css=Markup((source / "page.css").read_text(encoding="utf-8")),
        script=Markup((source / "page.js").read_text(encoding="utf-8")),
        data=Markup(data),
    )
    write_text(folder / "report.html", page)


def fitting(folder: Path, metrics: Metrics, max_bytes: int) -> tuple[str, int]:
    """The packed problems as JSON that is safe within a script element, and how many samples per problem it shows.

    As many samples of each sampling mode are shown token by token as have traces and fit.
    """
    lines = _read(folder / "predictions.jsonl")
    with explained(f"{folder / 'traces.jsonl'}: expected lines as `llm2 evaluate` writes them"):
        traces = {(line["id"], line["mode"]): line["traces"] for line in _read(folder / "traces.jsonl")}
    for shown in range(max(map(len, traces.values()), default=0), -1, -1):
        with explained(f"{folder}: expected predictions.jsonl and traces.jsonl as `llm2 evaluate` writes them"):
            data = pack(lines, traces, metrics, shown)
        packed = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        packed = packed.replace("<", "\\u003c")  # no text of a model may end the script element
        if len(packed.encode()) <= max_bytes:
            break
    return packed, shown


def pack(lines: list[dict], traces: dict, metrics: Metrics, shown: int) -> dict:
    """The data of page.js.

    Returns:
        {"modes", "compared": [plain, guided] or None, "beta", "vocabulary": [text], "scale": [low, middle, high]
        scores, "problems": [[id, question, gold, {mode: [sample]}]]}, where a sample is [answer, correct, tokens,
        score, text or trace or None] and a trace [[token], [score in hundredths], [[at, [candidate], [log-probability
        in hundredths], [score in hundredths], chosen, changed]]]; tokens and candidates are vocabulary indices.
    """
    vocabulary: dict[str, int] = {}

    def index(text: str) -> int:
        return vocabulary.setdefault(text, len(vocabulary))

    def packed_trace(trace: dict) -> list:
        scores = trace["scores"] and [_hundredths(score) for score in trace["scores"]]
        choices = [
            [
                choice["at"],
                [index(text) for text in choice["candidates"]],
                [_hundredths(value) for value in choice["logprobs"]],
                [_hundredths(value) for value in choice["scores"]],
                choice["chosen"],
                int(choice["changed"]),
            ]
            for choice in trace["choices"]
        ]
        return [[index(text) for text in trace["tokens"]], scores, choices]

    problems: dict[str, list] = {}
    for line in lines:
        mode = Mode(line["mode"])
        if mode not in metrics.modes:
            continue
        shown_traces = traces.get((line["id"], mode), [])[: shown if mode.sampled else 1]
        bodies = [packed_trace(trace) for trace in shown_traces] or [line["samples"][0]["text"]]
        bodies += [None] * (len(line["samples"]) - len(bodies))
        samples = [
            [sample["answer"], int(sample["correct"]), sample["tokens"], sample.get("score"), body]
            for sample, body in zip(line["samples"], bodies, strict=True)
        ]
        problems.setdefault(line["id"], [line["id"], line["question"], line["gold"], {}])[3][mode] = samples
    return {
        "modes": [mode for mode in Mode if mode in metrics.modes],
        "compared": next((pair for pair in (GREEDY, SAMPLING) if metrics.modes.keys() >= {*pair}), None),
        "beta": metrics.settings.get("beta"),
        "vocabulary": list(vocabulary),
        "scale": _scale(traces),
        "problems": list(problems.values()),
    }


def _scale(traces: dict) -> list[float]:
    """The 5th, 50th and 95th percentile of token scores: only differences between scores have a meaning."""
    records = [trace for line in traces.values() for trace in line]
    scores = sorted(score for trace in records for score in trace["scores"] or [])
    return [scores[math.floor(share * (len(scores) - 1))] for share in (0.05, 0.5, 0.95)] if scores else [0, 0, 0]


def _hundredths(value: float) -> int:
    return round(100 * value)


def _read(path: Path) -> list[dict]:
    """The objects of a JSON Lines file; none if there is no file."""
    keys = ("id", "mode")
    return [line for _, line in read_jsonl(path, "results", keys, skip_torn_line=True)] if path.exists() else []
