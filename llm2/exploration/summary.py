"""What an exploration tells at its end: counts, cost, the histogram of qualities. Knows nothing of how it ran."""

import resource
import sys
from collections.abc import Sequence

BAR = 40  # characters of the histogram's longest bar


def summary(counts: dict[str, int], histogram: Sequence[int], tokens: int, seconds: float) -> dict:
    """The report as it is written; `tokens` are those that this run generated, in `seconds`."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        **counts,
        "tokens_per_triplet": counts["generated_tokens"] / counts["triplets"],
        "seconds": seconds,  # of this run: a resumed one does not know how long it took before
        "tokens_per_second": tokens / seconds,
        "peak_rss_mib": peak / (2**20 if sys.platform == "darwin" else 2**10),  # of the first process
        "quality_histogram": list(histogram),  # of all tokens rolled out, in equal parts of [0, 1]
    }


def render(report: dict) -> str:
    """The report as it is printed."""
    histogram = report["quality_histogram"]
    lines = [f"{key:>20}  {value:,.0f}" for key, value in report.items() if key != "quality_histogram"]
    lines.append("quality of the plausible tokens:")
    for i, count in enumerate(histogram):
        low, high = i / len(histogram), (i + 1) / len(histogram)
        lines.append(f"{low:>14.1f} - {high:.1f}  {count:>8,}  {'#' * round(BAR * count / max(1, *histogram))}")
    return "\n".join(lines)
