"""Measure speed: run cases in turn, report medians over rounds and ratios within a round.

Shared machines drift, but cases that run one right after the other drift together. So each round runs every case once,
a ratio compares two rates of one round, and a figure is the median over rounds with its minimum and maximum.
"""

import json
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from llm2.common.config_file import as_dict
from llm2.common.files import write_text
from llm2.common.peak_memory import MIB


@dataclass
class BenchmarkCase:
    """One row of a benchmark; `run` does the work once and returns how many units of it were done."""

    name: str
    run: Callable[[], float]
    unit: str  # of the rates, such as "tokens/s"
    batch_size: int
    ratio_to: str | None = None  # name of the baseline, a case of the same batch size
    peak_mib: float | None = None
    extra: dict = field(default_factory=dict)  # further columns
    rates: list[float] = field(default_factory=list)  # units per second, one per round


def run_interleaved(
    cases: Sequence[BenchmarkCase],
    config: Any,
    description: str,
    earlier: Sequence[BenchmarkCase] = (),
    columns: Sequence[str] = (),
) -> None:
    """Warm up each case once, then run all of them in turn, `config.rounds` times, and append to their rates.

    After each run `config.output` holds what has been measured, so that little is lost where a run is cut short; a
    row, with the keys `columns` of its `extra`, is printed once its rounds are complete.

    Args:
        earlier: cases that are complete, for the file.
    """
    rounds = config.rounds
    with tqdm(total=len(cases) * (rounds + 1), desc=description, unit="run") as bar:
        for measured in [False] + [True] * rounds:
            for case in cases:
                start = time.perf_counter()
                units = case.run()
                seconds = time.perf_counter() - start
                if measured:
                    case.rates.append(units / seconds)
                    rows = result_rows([*earlier, *(case for case in cases if case.rates)])
                    write_results(Path(config.output), rounds, rows, config=as_dict(config))
                if len(case.rates) == rounds:
                    name = (case.name, case.batch_size)
                    row = next(row for row in rows if (row["name"], row["batch_size"]) == name)
                    bar.write(markdown_table([row], columns).splitlines()[-1], file=sys.stdout)
                bar.set_postfix_str(case.name)
                bar.update()


def peak_memory(run: Callable[[], object], device: torch.device) -> float:
    """Peak memory of a run in MiB: allocated on a GPU; elsewhere resident in this process, libraries included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / MIB
    peak, done = resident_mib(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, resident_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return peak


def resident_mib() -> float:
    """Resident memory of this process, MiB."""
    return psutil.Process().memory_info().rss / MIB


def report(config: Any, cases: Sequence[BenchmarkCase], columns: Sequence[str] = (), **extra) -> str:
    """Write `config.output` and return the table; `columns` are keys of the cases' `extra` to show in it."""
    rows = result_rows(cases)
    write_results(Path(config.output), config.rounds, rows, config=as_dict(config), **extra)
    return markdown_table(rows, columns)


def result_rows(cases: Sequence[BenchmarkCase]) -> list[dict]:
    """The rows of the JSON file."""
    rates = {(case.name, case.batch_size): case.rates for case in cases}
    return [
        result_row(
            case.name,
            spread(case.rates),
            case.unit,
            batch_size=case.batch_size,
            ratio_to=case.ratio_to,
            ratio=spread(ratios(case.rates, rates[case.ratio_to, case.batch_size])) if case.ratio_to else None,
            peak_mib=case.peak_mib,
            **case.extra,
        )
        for case in cases
    ]


def result_row(
    name: str,
    value: dict[str, float],
    unit: str,
    *,
    batch_size: int | str = "",
    ratio_to: str | None = None,
    ratio: dict[str, float] | None = None,
    peak_mib: float | None = None,
    **extra,
) -> dict:
    """One row of the JSON file; `value` and `ratio` have median, min and max."""
    row = {"name": name, "batch_size": batch_size, "value": value, "unit": unit}
    return row | {"ratio_to": ratio_to, "ratio": ratio, "peak_mib": peak_mib, **extra}


def ratios(rates: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Rate over baseline, round by round."""
    return [rate / base for rate, base in zip(rates, baseline, strict=False)]  # one may be a round ahead


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def write_results(path: Path, rounds: int, rows: Sequence[dict], **extra) -> None:
    """Write the JSON file: machine, versions, rounds (key `runs`), `extra`, rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    versions["python"] = platform.python_version()
    content = {"machine": machine(), "versions": versions, "runs": rounds, **extra, "rows": list(rows)}
    write_text(path, json.dumps(content, indent=2) + "\n")


def machine() -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"system": platform.platform(), "processor": processor(), "threads": torch.get_num_threads(), "gpu": gpu}


def processor() -> str:
    """The processor's name on Linux, elsewhere its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def markdown_table(rows: Sequence[dict], extra: Sequence[str] = ()) -> str:
    """The rows as a Markdown table; `extra` names further columns."""
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
