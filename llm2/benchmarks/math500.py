r"""MATH-500: its records from the hub or a local file, and its grader, the library math-verify in processes of its own.

Knows the format, {"problem", "solution", "answer", "unique_id"}, with the answer in LaTeX. A comparison of two formulas
may run for minutes or for ever, in sympy or below it, where no signal gets through: so it runs in a process that is
ended when its time is up. That works from any thread. The time is the process's own: how busy the machine is changes no
grade.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from multiprocessing.connection import Connection
from queue import SimpleQueue

import psutil

from llm2.benchmarks.records import hub_rows, read_records
from llm2.errors import UserError
from llm2.grading import Grade

DATASET = "HuggingFaceH4/MATH-500"
SPLITS = ("test",)
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
TIME_LIMIT = 5.0  # seconds of computing a solution
CLOCK_LIMIT = 20  # times that by the clock, where others use the core too
START_LIMIT = 600.0  # seconds until a new process has imported sympy
LONGEST = 20_000  # characters that are parsed, from the end


def hub_records(split: str, limit: int | None = None) -> list[dict]:
    """MATH-500 itself, from the hub or its local cache."""
    if split not in SPLITS:
        raise UserError(f"math500 has no split {split!r}: expected one of {', '.join(SPLITS)}")
    return [_record(row, f"{split}-{index}") for index, row in enumerate(islice(hub_rows(DATASET, split), limit))]


def file_records(path: str, split: str, limit: int | None = None) -> list[dict]:
    """The records of a local JSON lines file in the same format."""
    rows = islice(read_records(path, ("problem", "answer")), limit)
    return [_record(row, f"{split}-{index}") for index, (_, row) in enumerate(rows)]


def _record(row: dict, name: str) -> dict:
    return {
        "id": str(row.get("unique_id", name)),
        "question": row["problem"],
        "solution": row.get("solution", ""),
        "gold": row["answer"],
        "instruction": INSTRUCTION,
    }


class MathGrader:
    """Grades solutions by math-verify, several at a time; a solution that takes longer than its time is wrong.

    Args:
        workers: processes; by default one a core, at most four.
        time_limit: seconds of computing a solution.
    """

    def __init__(self, workers: int | None = None, time_limit: float = TIME_LIMIT) -> None:
        self.time_limit = time_limit
        workers = workers or min(4, os.cpu_count() or 1)
        self.idle: SimpleQueue[_Worker | None] = SimpleQueue()
        for _ in range(workers):
            self.idle.put(None)  # a process is started when it is first needed
        self.threads = ThreadPoolExecutor(workers)

    def __call__(self, texts: Sequence[str], gold: str) -> list[Grade]:
        return list(self.threads.map(lambda text: self._grade(text, gold), texts))

    def close(self) -> None:
        """End the processes."""
        self.threads.shutdown()
        while not self.idle.empty():
            worker = self.idle.get()
            if worker:
                worker.end()

    def _grade(self, text: str, gold: str) -> Grade:
        worker = self.idle.get() or _Worker()
        try:
            return worker.ask(text, gold, self.time_limit)
        except (TimeoutError, EOFError, BrokenPipeError, psutil.Error):  # too slow, or ended by its own memory
            worker.end()
            worker = None
            return Grade(None, False, False)
        finally:
            self.idle.put(worker)


class _Worker:
    """A process that grades one solution at a time."""

    starting = threading.Lock()  # processes are started one after the other

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of the parent's threads
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other,), daemon=True)
        with self.starting:
            self.process.start()
            other.close()
        if not self.pipe.poll(START_LIMIT):
            raise TimeoutError
        self.pipe.recv()

    def ask(self, text: str, gold: str, time_limit: float) -> Grade:
        """Raises TimeoutError once the process has computed, or waited for a core, for too long."""
        end, deadline = self._computed() + time_limit, time.monotonic() + CLOCK_LIMIT * time_limit
        self.pipe.send((text, gold))
        while not self.pipe.poll(max(end - self._computed(), 0.01)):
            if self._computed() >= end or time.monotonic() >= deadline:
                raise TimeoutError
        return self.pipe.recv()

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def _computed(self) -> float:
        """Seconds that the process has had a core."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system


def _serve(pipe: Connection) -> None:
    """Runs in the worker: imports math-verify, says so, grades until the pipe is closed."""
    import logging

    import math_verify  # noqa: F401

    logging.disable(logging.CRITICAL)  # math-verify says at length that it leaves the time limit to its caller
    pipe.send(None)
    while True:
        try:
            text, gold = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(grade(text, gold))
        except Exception:  # parsers and sympy raise what they like on what models write
            pipe.send(Grade(None, False, False))


def grade(text: str, gold: str) -> Grade:
    r"""One solution's grade, without a time limit; strict: with a `\boxed`.

    Right answers all read as gold's; wrong ones as sympy's form of them.
    """
    from math_verify import parse, verify

    text = text[-LONGEST:]
    answer = parse(text, parsing_timeout=None)
    if not answer:
        return Grade(None, False, False)
    right = bool(verify(parse(f"\\boxed{{{gold}}}", parsing_timeout=None), answer, timeout_seconds=None))
    return Grade(gold if right else str(answer[0]), right, right and "\\boxed" in text)
