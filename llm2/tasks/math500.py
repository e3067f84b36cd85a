r"""MATH-500: its records from the hub or a local file, and its grader: math-verify in worker processes.

The format is {"problem", "solution", "answer", "unique_id"}, with the answer in LaTeX. Comparing two formulas may not
terminate, and signals do not interrupt native code; a worker process can be killed at a time limit.
"""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context
from typing import Any

from pebble import ProcessPool

from llm2.common.chat import Message
from llm2.common.jsonl import read_jsonl
from llm2.errors import UserError
from llm2.tasks.grading import Grade, own_solution
from llm2.tasks.hub import hub_rows
from llm2.tasks.task import Problem, Task

DATASET = "HuggingFaceH4/MATH-500"
SPLITS = ("test",)
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
TIME_LIMIT = 30.0  # seconds; grading usually takes milliseconds, so a busy machine changes no grade
TINY = 1e-4  # math-verify compares numbers to six decimals
LONGEST = 20_000  # trailing characters of a solution that are parsed


class Math500(Task):
    """Competition problems with answers in LaTeX, from the hub or a file of the same format."""

    def __init__(self, data_file: str | None = None) -> None:
        super().__init__(data_file)
        self.grader: MathGrader | None = None  # its processes start at the first call of `grade`

    def problems(self, split: str, limit: int | None = None) -> list[Problem]:
        if self.data_file is not None:
            rows = (row for _, row in read_jsonl(self.data_file, "problems", ("problem", "answer")))
        elif split not in SPLITS:
            raise UserError(f"math500 has no split {split!r}: expected one of {', '.join(SPLITS)}")
        else:
            rows = hub_rows(DATASET, split)
        return [
            Problem(
                id=str(row.get("unique_id", f"{split}-{index}")),
                question=row["problem"],
                gold=row["answer"],
                solution=row.get("solution", ""),
            )
            for index, row in enumerate(islice(rows, limit))
        ]

    def prompt(self, problem: Problem) -> list[Message]:
        return super().prompt(replace(problem, question=f"{problem.question}\n\n{INSTRUCTION}"))

    def grade(self, texts: Sequence[str], gold: str) -> list[Grade]:
        self.grader = self.grader or MathGrader()
        return self.grader(texts, gold)

    def close(self) -> None:
        if self.grader is not None:
            self.grader.close()


class MathGrader:
    """Grades solutions with math-verify in parallel; one that times out or crashes its process is wrong."""

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
    logging.disable(logging.CRITICAL)  # math-verify warns that no time limit is set
    grade("\\boxed{1}", "1")  # imports take seconds, which would count against the first solution


def _result(future: Future) -> Grade:
    error = future.exception()  # too slow, out of memory, or an error of the parsers or sympy
    if isinstance(error, BrokenProcessPool):  # no process can be started
        raise error
    return Grade(None, False, False) if error else future.result()


def grade(text: str, gold: str) -> Grade:
    r"""One solution's grade, without a time limit; strict: with a `\boxed`.

    A correct answer is returned as gold's text, so that correct ones vote together; a wrong one as sympy writes it.
    """
    from math_verify import parse, verify

    text = own_solution(text)[-LONGEST:]
    answer = parse(text, parsing_timeout=None)
    if not answer:
        return Grade(None, False, False)
    expected = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    right = bool(verify(expected, answer, timeout_seconds=None)) and not _both_tiny_and_apart(expected[0], answer[0])
    return Grade(gold if right else str(answer[0]), right, right and "\\boxed" in text)


def _both_tiny_and_apart(gold: Any, answer: Any) -> bool:
    """Whether two different numbers of sympy are so small that math-verify rounds both to 0 and calls them equal."""
    if not all(getattr(value, "is_number", False) for value in (gold, answer)):
        return False
    larger = max(abs(gold), abs(answer))
    return bool(larger < TINY and abs(gold - answer) > TINY * larger)
