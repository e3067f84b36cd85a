"""Report of a results folder: the printed table, plots, and a page with every problem.

All figures come from metrics.json; nothing is recomputed.
"""

from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

from llm2.common.files import write_bytes
from llm2.evaluation.report.read import read_metrics
from llm2.evaluation.report.table import table

__all__ = ["read_metrics", "table", "write_report"]

WITHOUT_PLOTS = "(no plots, no report.html without matplotlib: `pip install 'llm2[report]'`; then `llm2 report {}`)"


def write_report(folder: str | Path) -> str:
    """Write the plots and report.html of a results folder, return its table. Raises UserError for a bad file."""
    folder = Path(folder)
    metrics = read_metrics(folder / "metrics.json")
    if find_spec("matplotlib") is None:  # an optional dependency
        return f"{table(metrics)}\n{WITHOUT_PLOTS.format(folder)}"
    from llm2.evaluation.report.page import write_page
    from llm2.evaluation.report.plots import figures

    plots = figures(metrics)
    for name, figure in plots.items():
        image = BytesIO()
        figure.savefig(image, format="png", dpi=160)
        write_bytes(folder / f"{name}.png", image.getvalue())
    write_page(folder, metrics, plots)
    return table(metrics)
