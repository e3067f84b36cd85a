"""What a results folder says to people: the table that commands print, plots, and a page to look into every problem.

Leaves decoding, grading, intervals and paired tests to others: every figure here was computed before it was written.
"""

from pathlib import Path

from llm2.evaluation.report.page import write_page
from llm2.evaluation.report.palette import INK, SYSTEM1, SYSTEM2, WRONG
from llm2.evaluation.report.plots import figures, plot
from llm2.evaluation.report.read import parse, read_metrics
from llm2.evaluation.report.table import markdown_table, table

__all__ = ["INK", "SYSTEM1", "SYSTEM2", "WRONG", "markdown_table", "plot", "read_metrics", "table", "write_report"]


def write_report(folder: str | Path) -> str:
    """Write the plots and report.html of a results folder, return its table. Raises UserError for a bad file."""
    folder = Path(folder)
    metrics = read_metrics(folder / "metrics.json")
    drawn = figures(parse(metrics, "the metrics"))
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=160)
    write_page(folder, parse(metrics, "the metrics"), drawn)
    return table(metrics)
