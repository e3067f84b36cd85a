"""How speed is measured here: cases in turn within one run, medians with their spread, ratios pair by pair.

A machine that is shared drifts; two cases timed one right after the other drift together. So each round runs
every case once, a ratio is made within a round, and a figure is the median over the rounds with the smallest and
the largest beside it. Knows nothing of what is timed.
"""

import json
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from tqdm import tqdm


@dataclass
class BenchmarkCase:
    """One row of a benchmark. `run` does the work once and returns how many units of it were done."""

    name: str
    run: Callable[[], float]
    unit: str  # of the figure: units of work a second, such as "tokens/s"
    batch_size: int
    ratio_to: str | None = None  # the case of the same batch size that it is held against
    peak_mib: float | None = None
    extra: dict = field(default_factory=dict)  # more columns of the row
    rates: list[float] = field(default_factory=list)  # a figure a round


def run_interleaved(cases: Sequence[BenchmarkCase], rounds: int, description: str) -> None:
    """Warm each case up once, then run all of them in turn, `rounds` times, and note their rates."""
    with tqdm(total=len(cases) * (rounds + 1), desc=description, unit="run") as bar:
        for number in range(-1, rounds):
            for case in cases:
                start = time.perf_counter()
                done = case.run()
                seconds = time.perf_counter() - start
                if number >= 0:
                    case.rates.append(done / seconds)
                bar.set_postfix_str(case.name)
                bar.update()


def peak_memory(run: Callable[[], object], device: torch.device) -> float:
    """MiB at the peak of a run: allocated on a GPU, resident in the process elsewhere (all models that it holds)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**20
    done, peak = threading.Event(), 0.0

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, psutil.Process().memory_info().rss / 2**20)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return peak


def rows(cases: Sequence[BenchmarkCase]) -> list[dict]:
    """The rows of the JSON file; a ratio is taken round by round."""
    rates = {(case.name, case.batch_size): case.rates for case in cases}
    found = []
    for case in cases:
        base = rates.get((case.ratio_to, case.batch_size))
        ratio = None if base is None else [own / other for own, other in zip(case.rates, base, strict=True)]
        found.append(
            {
                "name": case.name,
                "batch_size": case.batch_size,
                "value": spread(case.rates),
                "unit": case.unit,
                "ratio_to": case.ratio_to,
                "ratio": None if ratio is None else spread(ratio),
                "peak_mib": case.peak_mib,
                **case.extra,
            }
        )
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def write_results(path: Path, rounds: int, rows: Sequence[dict], **extra) -> None:
    """`path` in the format that DESIGN's contract of `results/benchmark/NAME.json` fixes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in ("torch", "transformers", "peft")} | {
        "python": platform.python_version()
    }
    content = {"machine": machine(), "versions": versions, "runs": rounds, **extra, "rows": list(rows)}
    path.write_text(json.dumps(content, indent=2) + "\n")


def machine() -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"system": platform.platform(), "processor": processor(), "threads": torch.get_num_threads(), "gpu": gpu}


def processor() -> str:
    """The processor's name where the system tells it (Linux), else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def markdown_table(rows: Sequence[dict], extra: Sequence[str] = ()) -> str:
    """The rows as the README shows them; `extra` names more columns of the rows."""
    header = ["", "batch", "median [min, max]", "unit", "ratio [min, max]", "to", "peak MiB", *extra]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        value, ratio = row["value"], row["ratio"]
        lines.append(
            [
                row["name"],
                str(row["batch_size"]),
                f"{value['median']:,.4g} [{value['min']:,.4g}, {value['max']:,.4g}]",
                row["unit"],
                f"{ratio['median']:.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}]" if ratio else "",
                row["ratio_to"] or "",
                f"{row['peak_mib']:,.0f}" if row["peak_mib"] is not None else "",
                *(f"{row[key]:.3g}" if isinstance(row.get(key), float) else str(row.get(key, "")) for key in extra),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
