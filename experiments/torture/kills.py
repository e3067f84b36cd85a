"""Runs that are killed, find no room, may not write or meet another run: going on gives an undisturbed run's files.

Compared are all files that a run leaves, but checkpoints, which are the Trainer's, and the keys in TIMES, which differ
between any two runs; the rest is equal byte for byte.
"""

import contextlib
import json
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from llm2.common.files import write_text
from tests.robustness.bad_input import Stock
from tests.robustness.commands import ROOT, family, keep_to_permissions, start
from tests.robustness.row import Row

KILLS = 20  # of each command with one process and with two, at full scale
RESUMES = True  # after the last disturbed run
CHAIN = 3  # kills of one run, at most, before it may go on to its end
PATIENCE = 300.0  # seconds in which a run must end, or after a kill its launcher
TIMES = ("seconds", "tokens_per_second", "peak_rss_mib", "peak_memory_mib", "train_seconds")
TIMES += ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")


@dataclass(frozen=True)
class Job:
    """A command that writes `output` into its working directory."""

    arguments: tuple[str, ...]
    output: str
    processes: int = 1

    @property
    def name(self) -> str:
        return f"{self.arguments[0]}, {self.processes} process{'es' * (self.processes > 1)}"

    @property
    def lock(self) -> str:
        return f"{self.output}.lock" if self.output.endswith(".jsonl") else f"{self.output}/.lock"

    def start(self, folder: Path, before: Callable[[], None] | None = None, piped: bool = False) -> subprocess.Popen:
        """In this folder; its output goes to the file log there, or to a pipe, which no limit on files touches."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log").write_text("")
        return start(self.arguments, None if piped else folder / "log", self.processes, folder, before)


def jobs(stock: Stock, processes: Sequence[int] = (1, 2)) -> list[Job]:
    """Small runs of every command that takes long."""
    model, task = ("model=testbed", "device=cpu"), ("task=testbed", "max_new_tokens=40", "batch_size=16")
    evaluation = (*model, *task, f"verifier={stock.verifier}", "traced_samples=1", "output_dir=out")
    commands = [
        Job(
            ("explore", *model, *task, "limit=4", "gold_rollouts=4", "max_rollouts=3", "output=out.jsonl"), "out.jsonl"
        ),
        Job(
            (
                "train",
                *model,
                f"train_file={ROOT / 'dataset' / 'testbed.jsonl'}",
                "output_dir=out",
                *("limit=24", "eval_share=0.2", "num_train_epochs=1.0", "evaluations=4", "learning_rate=1e-3"),
                *("global_batch_size=4", "per_device_train_batch_size=2"),
            ),
            "out",
        ),
        Job(("evaluate", *evaluation, "limit=6", "modes=[plain_greedy,guided_greedy,guided_sampling]",
             "num_samples=2", "majority_at=[1,2]"), "out"),
        Job(("sweep", *evaluation, "limit=3", "validation_limit=3", "betas=[0.5,2.0]"), "out"),
        Job(
            (
                *("pretrain", "output_dir=out", "documents=200", "max_steps=40", "save_steps=10", "batch_size=8"),
                *("hidden_size=32", "intermediate_size=64", "num_hidden_layers=1", "num_attention_heads=2"),
                *("num_key_value_heads=2", "card_problems=4"),
            ),
            "out",
        ),
    ]  # fmt: skip
    return [
        Job(job.arguments, job.output, number)
        for job in commands
        for number in processes
        if number == 1 or job.arguments[0] != "pretrain"  # which refuses several
    ]


class Undisturbed:
    """A job's result, and how long it works once it has begun to write."""

    def __init__(self, job: Job, folder: Path) -> None:
        process = job.start(folder)
        wait_for_lock(process, folder / job.lock)
        start = time.perf_counter()
        if status := process.wait(PATIENCE):
            raise AssertionError(f"{job.name}: status {status} undisturbed: {(folder / 'log').read_text()[-3000:]}")
        self.seconds, self.files = time.perf_counter() - start, outcome(folder, job)


def wait_for_lock(process: subprocess.Popen, lock: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not lock.exists():
        if time.monotonic() > deadline:
            raise AssertionError(f"no {lock} in {PATIENCE} seconds")
        time.sleep(0.02)


def outcome(folder: Path, job: Job) -> dict[str, bytes]:
    """The files of a run, without what differs between any two."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or name == "log" or "checkpoint-" in name or path.name == "training_args.bin":
            continue
        content = path.read_bytes()
        if path.suffix == ".json":
            record = json.loads(content)
            content = json.dumps({k: v for k, v in record.items() if k not in TIMES}, sort_keys=True).encode()
        found[name] = content
    return found


def differences(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def kill(process: subprocess.Popen, number: signal.Signals, draw: random.Random) -> str:
    """All processes of a run, or one of several; returns which."""
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = family(process.pid)
        workers = [child for child in tree[1:] if "llm2" in child.cmdline()]
        whole = len(workers) < 2 or draw.random() < 0.5
        for victim in tree if whole else [draw.choice(workers)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(number)
        process.wait(PATIENCE)  # the launcher ends the others
        return "all" if whole else "one"
    process.wait(PATIENCE)
    return "none: it had ended"


def killed_run(job: Job, folder: Path, expected: Undisturbed, draw: random.Random, most: int) -> tuple[int, str | None]:
    """Kill a run some times, let it go on to its end: (kills that hit it, what went wrong)."""
    hits, story = 0, []
    for _ in range(min(CHAIN, most)):
        process = job.start(folder)
        if draw.random() < 0.85:  # else while it starts
            wait_for_lock(process, folder / job.lock)
            delay = draw.uniform(0, expected.seconds)
        else:
            delay = draw.uniform(0, 5)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
            break  # it was faster than the undisturbed one
        number = draw.choice([signal.SIGKILL, signal.SIGTERM])
        whom = kill(process, number, draw)
        hits += 1
        story.append(f"{number.name} to {whom} after {delay:.2f} s")
    return hits, after(job, folder, expected, "; ".join(story))


def after(job: Job, folder: Path, expected: Undisturbed, story: str) -> str | None:
    """Go on, and compare. A run that was complete already may say so in its one sentence."""
    status = job.start(folder).wait(PATIENCE)
    log = (folder / "log").read_text()
    complete = status != 0 and "exists already" in log and not has_traceback(log)
    if status and not complete:
        return f"{story}: going on ended with status {status}: {log[-1500:]}"
    if wrong := differences(outcome(folder, job), expected.files):
        return f"{story}: other files than undisturbed: {wrong}"
    return None


def has_traceback(log: str) -> bool:
    """Whether a process of the run left one: where one of several fails, the launcher always adds its own."""
    return log.count("Traceback") > log.count("ChildFailedError:")


def flaw_of_refusal(job: Job, folder: Path, *says: str) -> str | None:
    """What is wrong with the answer of a run that had to give up."""
    log = (folder / "log").read_text()
    sentences = [line for line in log.replace("\r", "\n").splitlines() if line.startswith(f"llm2 {job.arguments[0]}: ")]
    if has_traceback(log) or len(sentences) != job.processes and len(sentences) != 1:
        return f"expected one sentence, found {log[-1500:]}"
    missing = [part for part in says if part not in sentences[0]]
    return f"expected {missing}, found {sentences[0]}" if missing else None


def without_room(job: Job, folder: Path, expected: Undisturbed, draw: random.Random) -> str | None:
    """No file may grow beyond some bytes, as on a full disk; then there is room again."""
    size = round(10 ** draw.uniform(2, 5.5))
    process = job.start(folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)), piped=True)
    said, _ = process.communicate(timeout=PATIENCE)
    (folder / "log").write_bytes(said)
    if process.returncode == 0:
        return None  # all files were smaller
    return flaw_of_refusal(job, folder) or after(job, folder, expected, f"files of {size} bytes at most")


def read_only(job: Job, folder: Path, expected: Undisturbed, draw: random.Random) -> str | None:
    folder.mkdir(parents=True)
    target = folder if job.output.endswith(".jsonl") else folder / job.output
    target.mkdir(exist_ok=True)
    (folder / "log").touch()
    target.chmod(0o555)
    try:
        job.start(folder, keep_to_permissions).wait(PATIENCE)
    finally:
        target.chmod(0o755)
    return flaw_of_refusal(job, folder, "Permission denied") or after(job, folder, expected, "read-only")


def two_runs(job: Job, folder: Path, expected: Undisturbed, draw: random.Random) -> str | None:
    """The second run on the same output is refused and names the first, which is not disturbed."""
    first = job.start(folder)
    wait_for_lock(first, folder / job.lock)
    tree = family(first.pid)
    for process in tree:
        process.suspend()  # else it could end before the second one has started
    (folder / "log").rename(folder / "first.log")
    arguments = [a.replace("=out", f"={folder}/out") if a.startswith("output") else a for a in job.arguments]
    aside = folder.with_name(f"{folder.name}-second")
    status = Job(tuple(arguments), job.output).start(aside).wait(PATIENCE)
    for process in tree:
        process.resume()
    if (ended := first.wait(PATIENCE)) != 0:
        return f"the first run ended with status {ended}: {(folder / 'first.log').read_text()[-1500:]}"
    (folder / "first.log").unlink()
    if status != 2:
        return f"the second run ended with status {status}: {(aside / 'log').read_text()[-1500:]}"
    named = f"another run (process {first.pid} on " if job.processes == 1 else "another run (process "
    problem = flaw_of_refusal(job, aside, named, " since ")
    return problem or str(differences(outcome(folder, job), expected.files) or "") or None


FAULTS = {  # and how often, at full scale
    "kills": (killed_run, KILLS),
    "no room on the disk": (without_room, 3),
    "a folder that may not be written": (read_only, 1),
    "two runs on one folder": (two_runs, 1),
}


def run(folder: Path, scale: float, only: Sequence[str] = (), processes: Sequence[int] = (1, 2)) -> list[Row]:
    """Args: only: commands; all when empty."""
    chosen = [job for job in jobs(Stock(folder), processes) if not only or job.arguments[0] in only]
    return [
        row for job in chosen for row in run_job(job, folder / job.name.replace(", ", "-").replace(" ", "-"), scale)
    ]


def run_job(job: Job, folder: Path, scale: float) -> list[Row]:
    """A row for each kind of fault; they are kept after every disturbed run, and it goes on from there."""
    kept = folder.with_suffix(".json")
    rows = {row["what"]: Row(**row) for row in json.loads(kept.read_text())} if kept.exists() else {}
    expected = None
    for name, (fault, most) in FAULTS.items():
        what, wanted = f"{name}: {job.name}", max(1, round(most * scale))
        row = rows.get(what, Row(what, 0, 0))
        draw = random.Random(f"{what}, from {row.tried}")
        for _ in range(10 * wanted):  # a run may be faster than its kill
            if row.tried >= wanted:
                break
            if expected is None:
                shutil.rmtree(folder, ignore_errors=True)
                expected = Undisturbed(job, folder / "undisturbed")
            place = folder / f"{fault.__name__}-{row.tried}"
            shutil.rmtree(place, ignore_errors=True)
            if fault is killed_run:
                hits, problem = killed_run(job, place, expected, draw, wanted - row.tried)
            else:
                hits, problem = 1, fault(job, place, expected, draw)
            row = Row(what, row.tried + hits, row.failed + bool(problem), problem[:300] if problem else row.detail)
            print(f"{what}: {row.tried}: {problem or 'survived'}", flush=True)
            if not problem:
                shutil.rmtree(place)
            rows[what] = row
            write_text(kept, json.dumps([asdict(row) for row in rows.values()], indent=2) + "\n")
    return list(rows.values())
