"""report.html: a single offline file to inspect every problem of a results folder.

Fills page.html with page.css, page.js and the data. A Content-Security-Policy allows only page.js and no loading of
other resources.
"""

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure

from llm2.common.files import write_text
from llm2.evaluation.report.pack import pack
from llm2.evaluation.report.plots import as_svg
from llm2.evaluation.report.read import Metrics
from llm2.evaluation.report.table import HEADER, choice, cost_lines, notes, rows, settings, title

MAX_BYTES = 100_000_000  # opens in Chromium within seconds; fits first traces of 20,000 problems in four modes


def write_page(folder: Path, metrics: Metrics, plots: dict[str, Figure]) -> None:
    """Write FOLDER/report.html, with the problems if FOLDER holds predictions.jsonl."""
    source = Path(__file__).parent
    templates = Environment(loader=FileSystemLoader(source), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    style, script = ((source / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    charts = {name: as_svg(figure, name) for name, figure in plots.items()}
    data, num_traces = pack(folder, metrics, MAX_BYTES - sum(map(len, charts.values())) - 200_000)
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
        num_traces=num_traces,
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode(),
        data=data,
    )
    write_text(folder / "report.html", page)
