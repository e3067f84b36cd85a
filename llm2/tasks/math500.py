r"""MATH-500: its records from the hub or a local file, and its grader, the library math-verify in processes of its own.

The format is {"problem", "solution", "answer", "unique_id"}, with the answer in LaTeX. A comparison of two formulas may
run for ever, in sympy or below it, where no signal gets through: hence processes, which a time limit can end.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context

from pebble import ProcessPool

from llm2.errors import UserError
from llm2.tasks.grading import Grade
from llm2.tasks.records import hub_rows, read_records

DATASET = "HuggingFaceH4/MATH-500"
SPLITS = ("test",)
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
TIME_LIMIT = 30.0  # seconds by the clock, far above the milliseconds of a usual one: a busy machine changes no grade
LONGEST = 20_000  # characters that are parsed, from the end


def hub_records(split: str, limit: int | None = None) -> list[dict]:
    """MATH-500 itself, from the hub or its local cache."""
    if split not in SPLITS:
        raise UserError(f"math500 has no split {split!r}: expected one of {', '.join(SPLITS)}")
    return _records(hub_rows(DATASET, split), split, limit)


def file_records(path: str, split: str, limit: int | None = None) -> list[dict]:
    """The records of a local JSON lines file in the same format."""
    return _records((row for _, row in read_records(path, ("problem", "answer"))), split, limit)


def _records(rows: Iterable[dict], split: str, limit: int | None) -> list[dict]:
    return [
        {
            "id": str(row.get("unique_id", f"{split}-{index}")),
            "question": row["problem"],
            "solution": row.get("solution", ""),
            "gold": row["answer"],
            "instruction": INSTRUCTION,
        }
        for index, row in enumerate(islice(rows, limit))
    ]


class MathGrader:
    """Grades solutions by math-verify, several at a time; one that takes too long or ends its process is wrong."""

    def __init__(self, workers: int | None = None, time_limit: float = TIME_LIMIT) -> None:
        self.time_limit = time_limit
        context = get_context("spawn")  # a fork would copy the locks of torch's threads
        self.pool = ProcessPool(workers or min(4, os.cpu_count() or 1), initializer=_warm_up, context=context)

    def __call__(self, texts: Sequence[str], gold: str) -> list[Grade]:
        futures = [self.pool.schedule(grade, (text, gold), timeout=self.time_limit) for text in texts]
        return [_result(future) for future in futures]

    def close(self) -> None:
        """End the processes."""
        self.pool.stop()
        self.pool.join()


def _warm_up() -> None:
    logging.disable(logging.CRITICAL)  # math-verify says at length that it leaves the time limit to its caller
    grade("\\boxed{1}", "1")  # its imports take seconds, which would be the first solution's


def _result(future: Future) -> Grade:
    error = future.exception()  # too slow, ended by its memory, or what parsers and sympy raise on what models write
    if isinstance(error, BrokenProcessPool):  # no process can be started
        raise error
    return Grade(None, False, False) if error else future.result()


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
