"""The output files of an exploration, and its report: counts, cost, the histogram of qualities."""

import json
from collections import Counter
from collections.abc import Sequence

from llm2.common.config_file import as_dict
from llm2.common.files import whole_file, write_text
from llm2.common.inputs import Digests
from llm2.common.journal import Journal
from llm2.common.peak_memory import peak_rss_mib
from llm2.config import ExploreConfig
from llm2.errors import UserError

BINS = 10  # of the histogram of qualities
BAR = 40  # characters of its longest bar


def write_outputs(
    config: ExploreConfig,
    inputs: Digests,
    journal: Journal,
    order: Sequence[str],
    earlier: frozenset[str],
    seconds: float,
    sources: dict[str, int],
) -> dict:
    """Write triplets, verdicts and report, then discard the journal. Returns the report.

    Args:
        order: ids of all problems, the order of lines in the files.
        earlier: ids of problems that an interrupted run had finished.
        seconds: duration of this run.
        sources: counts about the origin of the solutions, for the report.
    """
    output, total, histogram, tokens_now = config.output, Counter(), [0] * BINS, 0
    with whole_file(output) as lines, whole_file(f"{output}.pairs.jsonl") as verdicts:
        for entry in journal.read(order):
            total.update(entry["counts"])
            histogram = [a + b for a, b in zip(histogram, entry["histogram"], strict=True)]
            tokens_now += entry["counts"]["generated_tokens"] * (entry["id"] not in earlier)
            if entry["counts"]["triplets"]:
                lines.write(entry["line"])
            messages = json.loads(entry["line"])["messages"]
            verdicts.write(json.dumps({"id": entry["id"], "messages": messages, "pairs": entry["pairs"]}) + "\n")
        if not total["triplets"]:
            raise UserError(f"no triplets in {len(order)} problems: System 1 is never or always right at its forks")
        report = {
            **total,
            **sources,
            "tokens_per_triplet": total["generated_tokens"] / total["triplets"],
            "seconds": seconds,  # of this run, without the time before an interruption
            "tokens_per_second": tokens_now / seconds,
            "peak_rss_mib": peak_rss_mib(),  # of the main process
            "quality_histogram": histogram,  # of all tokens rolled out, in equal parts of [0, 1]
            "config": as_dict(config),
            "inputs": inputs,
        }
        write_text(f"{output}.report.json", json.dumps(report, indent=2) + "\n")
    journal.discard()
    return report


def render(report: dict) -> str:
    """The report as text."""
    histogram = report["quality_histogram"]
    lines = [f"{key:>20}  {value:,.0f}" for key, value in report.items() if isinstance(value, int | float)]
    lines.append("quality of the plausible tokens:")
    for i, count in enumerate(histogram):
        low, high = i / len(histogram), (i + 1) / len(histogram)
        lines.append(f"{low:>14.1f} - {high:.1f}  {count:>8,}  {'#' * round(BAR * count / max(1, *histogram))}")
    return "\n".join(lines)
