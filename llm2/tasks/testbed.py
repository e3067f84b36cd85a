"""Tasks of the embedded testbed (llm2/testbed): word problems in GSM8K's format by regime, and lists to sort."""

import re
from dataclasses import replace

from llm2.errors import UserError
from llm2.tasks.gsm8k import GSM8K, to_problem
from llm2.tasks.task import Problem, Task
from llm2.testbed.generator import SIZES, problems
from llm2.testbed.sorting import sorted_text, sorting_problems


class Testbed(GSM8K):
    """Generated word problems, always the same ones."""

    __test__ = False  # not a test class, for pytest
    regime = "same"

    def source(self, split: str, limit: int | None) -> list[Problem]:
        check_split(split)
        return [
            to_problem(record["id"], record["question"], record["answer"])
            for record in problems(split, limit, self.regime)
        ]


class Foreign(Testbed):
    """Gold solutions in another style than System 1's."""

    regime = "foreign"


class Answers(Testbed):
    """Final answers without solutions."""

    regime = "answers"

    def source(self, split: str, limit: int | None) -> list[Problem]:
        return [replace(problem, solution="") for problem in super().source(split, limit)]


class Careful(Testbed):
    """For a System 1 that was fine-tuned on gold solutions."""

    regime = "careful"


class TwoSkills(Testbed):
    """For a System 1 that sorts lists too."""

    regime = "two_skills"


class MoreSteps(Testbed):
    """Longer problems than System 1 was trained on."""

    regime = "more_steps"


class NewWords(Testbed):
    """Names and things that System 1 was not trained on."""

    regime = "new_words"


class LargeNumbers(Testbed):
    """Larger results than System 1 was trained on."""

    regime = "large_numbers"


class Sorting(Task):
    """Lists of numbers to sort: the second skill."""

    def problems(self, split: str, limit: int | None = None) -> list[Problem]:
        check_split(split)
        return [
            Problem(record["id"], record["question"], record["answer"], sorted_text(record["answer"]))
            for record in sorting_problems(split, limit)
        ]

    def extract_answer(self, text: str) -> str | None:
        lists = re.findall(r"\d+(?:, \d+)+", text)
        return lists[-1] if lists else None


def check_split(split: str) -> None:
    if split not in SIZES:
        raise UserError(f"testbed has no split {split!r}: expected one of {', '.join(SIZES)}")
