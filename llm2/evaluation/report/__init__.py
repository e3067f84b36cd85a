"""A results folder for people: the table that commands print, plots, and a page with every problem.

Every figure comes from metrics.json; nothing is computed here.
"""

from pathlib import Path

from llm2.errors import UserError
from llm2.evaluation.report.palette import INK, SYSTEM1, SYSTEM2, WRONG
from llm2.evaluation.report.read import read_metrics
from llm2.evaluation.report.table import markdown_table, table

try:
    from llm2.evaluation.report.page import write_page
    from llm2.evaluation.report.plots import figures
except ModuleNotFoundError as error:  # an optional extra
    way_out = "pip install 'llm2[report]', then `python -m llm2 report FOLDER`"
    raise UserError(f"the report needs {error.name}: {way_out}") from None

__all__ = ["INK", "SYSTEM1", "SYSTEM2", "WRONG", "markdown_table", "read_metrics", "table", "write_report"]


def write_report(folder: str | Path) -> str:
    """Write the plots and report.html of a results folder, return its table. Raises UserError for a bad file."""
    folder = Path(folder)
    metrics = read_metrics(folder / "metrics.json")
    plots = figures(metrics)
    for name, figure in plots.items():
        figure.savefig(folder / f"{name}.png", dpi=160)
    write_page(folder, metrics, plots)
    return table(metrics)
