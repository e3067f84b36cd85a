"""Long evaluations and a long exploration: memory, open files, threads and temporary files stay flat.

The slope is that of a least-squares line over the samples after the first third, until the journal is closed: then all
predictions are read once for the figures. KV caches are reserved whole at the start, and their pages become resident
as sequences grow that long, so that each way of decoding has a run and a warm-up of its own.
"""

import json
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
from matplotlib.figure import Figure

from experiments.study.plot import save
from llm2.evaluation.report.palette import GRID, INK, SYSTEM1
from tests.robustness.commands import family, last_words, settings, start
from tests.robustness.row import Row

INTERVAL = 3.0  # seconds between samples
WARM_UP = 1 / 3  # share of the samples before which caches, buffers and pools grow
# What a line over the samples may rise by from its first to its last: a leak of one for each of 2,000 problems shows.
TOLERANCE = {"resident_mib": 60.0, "address_space_mib": 60.0}
TOLERANCE |= {"open_files": 3.0, "threads": 2.0, "temporary_files": 3.0}
LABELS = {
    "address_space_mib": "address space, MiB",
    "resident_mib": "resident, MiB",
    "open_files": "open files",
    "threads": "threads",
    "temporary_files": "temp. files",
}
PROBLEMS = {"plain_greedy": 20_000, "guided_greedy": 20_000, "explore": 2_000}


@dataclass(frozen=True)
class Sample:
    """Resources of the process at one moment of a long run."""

    seconds: float
    address_space_mib: float
    resident_mib: float
    open_files: int
    threads: int
    temporary_files: int
    done: bool  # the journal is closed


def run(folder: Path, scale: float, interval: float = INTERVAL) -> list[Row]:
    return [soak(name, folder / name, max(4, round(scale * count)), interval) for name, count in PROBLEMS.items()]


def soak(name: str, folder: Path, count: int, interval: float) -> Row:
    folder.mkdir(parents=True, exist_ok=True)
    common = {"model": "testbed", "task": "testbed", "limit": count, "device": "cpu", "max_new_tokens": 200}
    common |= {"batch_size": 256}
    command = "explore" if name == "explore" else "evaluate"
    if command == "explore":
        arguments, journal = {"output": folder / "triplets.jsonl"}, folder / "triplets.jsonl.partial"
    else:  # the only split that has as many problems; System 1 was trained on some of them
        arguments, journal = {"output_dir": folder / "results", "split": "pretrain"}, folder / "results" / "journal"
        arguments |= {"modes": f"[{name}]"}
    if name == "guided_greedy":
        arguments |= {"beta": 0.5, "verifier": folder / "verifier"}
        train = {"model": "testbed", "device": "cpu", "train_file": "dataset/testbed.jsonl", "limit": 200}
        train |= {"output_dir": folder / "verifier", "learning_rate": 1e-3, "global_batch_size": 16}
        train |= {"kind": "lora", "lora_r": 4}
        start(["train", *settings(train)], folder / "train.log").wait()
    with tempfile.TemporaryDirectory() as temporary:
        log = folder / "log"
        process = start([command, *settings(common | arguments)], log, TMPDIR=temporary)
        samples = watch(psutil.Process(process.pid), Path(temporary), journal, interval)
        status = process.wait()
    (folder / "samples.json").write_text(json.dumps([asdict(sample) for sample in samples]) + "\n")
    steady = [sample for sample in samples if not sample.done]
    steady = steady[round(WARM_UP * len(steady)) :]
    if status or len(steady) < 3:
        return Row(f"soak: {name}", count, 1, f"status {status}, {len(samples)} samples: {last_words(log)}")
    rises = {key: rise([s.seconds for s in steady], [getattr(s, key) for s in steady]) for key in TOLERANCE}
    save(draw(f"{name}, {count:,} problems", samples, steady[0].seconds), folder / f"{name}.svg")
    failed = [key for key, value in rises.items() if value > TOLERANCE[key]]
    figures = ", ".join(f"{LABELS[key]} {value:+.1f} (at most {TOLERANCE[key]:g})" for key, value in rises.items())
    minutes, peak = samples[-1].seconds / 60, max(sample.resident_mib for sample in samples)
    detail = (
        f"{len(samples)} samples in {minutes:.1f} min; rise after warm-up: {figures}; resident at most {peak:,.0f} MiB"
    )
    return Row(f"soak: {name}", count, len(failed), detail)


def watch(process: psutil.Process, temporary: Path, journal: Path, interval: float) -> list[Sample]:
    """Samples of the process and its children, from the journal's first appearance to the end."""
    samples, begun, seen = [], time.monotonic(), False
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:  # our own child: a zombie until waited for
        with suppress(psutil.Error):  # one of them has just ended
            tree = family(process.pid)
            seen = seen or journal.exists()
            sample = Sample(
                time.monotonic() - begun,
                sum(each.memory_info().vms for each in tree) / 2**20,
                sum(each.memory_info().rss for each in tree) / 2**20,
                sum(each.num_fds() for each in tree),
                sum(each.num_threads() for each in tree),
                sum(1 for _ in temporary.rglob("*")),
                seen and not journal.exists(),
            )
            if seen:
                samples.append(sample)
        time.sleep(interval)
    return samples


def rise(seconds: list[float], values: list[float]) -> float:
    """Of the least-squares line, from its first point to its last."""
    slope, _ = np.polyfit(seconds, values, 1)
    return float(slope * (seconds[-1] - seconds[0]))


def draw(title: str, samples: list[Sample], warm: float) -> Figure:
    """A panel for each figure, over minutes; the warm-up is shaded."""
    figure = Figure(figsize=(7.2, 8.4), layout="constrained")
    panels = figure.subplots(len(LABELS), 1, sharex=True)
    for axes, (key, label) in zip(panels, LABELS.items(), strict=True):
        axes.plot([s.seconds / 60 for s in samples], [getattr(s, key) for s in samples], color=SYSTEM1, linewidth=1.4)
        axes.axvspan(samples[0].seconds / 60, warm / 60, color=GRID, alpha=0.5, linewidth=0)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(label, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    panels[-1].set_xlabel("minutes", color=INK)
    figure.suptitle(title, color=INK)
    return figure
