"""MAWPS and SVAMP: real word problems of one or two steps, whose gold is an equation and a number.

{"question": ..., "answer": "((7 + 5) - 8) #### 4"}, read from dataset/word_problems, which has sources and licence.
"""

import re
from itertools import accumulate
from pathlib import Path

import llm2
from llm2.errors import UserError
from llm2.tasks.gsm8k import read_problems, split_answer
from llm2.tasks.task import NumberTask, Problem

FOLDER = Path(llm2.__file__).parents[1] / "dataset" / "word_problems"


class WordProblems(NumberTask):
    """Base class; subclasses set `splits`. The gold solution is the equation as a sentence."""

    splits: tuple[str, ...]

    def problems(self, split: str, limit: int | None = None) -> list[Problem]:
        return read_problems(self.data_file or self._file(split), split, limit, to_problem)

    def _file(self, split: str) -> str:
        name = type(self).__name__.lower()
        if split not in self.splits:
            raise UserError(f"{name} has no split {split!r}: expected one of {', '.join(self.splits)}")
        if not FOLDER.is_dir():
            raise UserError(f"{name} is part of a checkout; expected data_file=<{name}_{split}.jsonl>, found none")
        return str(FOLDER / f"{name}_{split}.jsonl")


class Mawps(WordProblems):
    """MAWPS (Koncel-Kedziorski et al., NAACL 2016)."""

    splits = ("train", "validation")


class Svamp(WordProblems):
    """SVAMP (Patel et al., arXiv 2103.07191)."""

    splits = ("test",)


def to_problem(name: str, question: str, answer: str) -> Problem:
    """`(8 - 2) #### 6` becomes the solution `8 - 2 = 6. The answer is 6.`

    Raises ValueError if the answer does not end in `#### number`.
    """
    equation, gold = split_answer(answer)
    compact = re.sub(r"(?<=\() | (?=\))", "", equation.strip())
    if _is_enclosed(compact):
        compact = compact[1:-1]
    return Problem(name, question, gold, f"{compact} = {gold}. The answer is {gold}.")


def _is_enclosed(equation: str) -> bool:
    """Whether the first parenthesis is closed by the last character."""
    depth = list(accumulate((character == "(") - (character == ")") for character in equation))
    return depth[-1:] == [0] and 0 not in depth[:-1]
