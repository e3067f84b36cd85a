"""The embedded testbed's word problems (llm2/testbed), in GSM8K's format."""

from llm2.errors import UserError
from llm2.tasks.gsm8k import GSM8K, to_problem
from llm2.tasks.task import Problem
from llm2.testbed.generator import SIZES, problems


class Testbed(GSM8K):
    """Generated problems, the same ones every time."""

    __test__ = False  # pytest must not collect it, whatever its name

    def source(self, split: str, limit: int | None) -> list[Problem]:
        if split not in SIZES:
            raise UserError(f"testbed has no split {split!r}: expected one of {', '.join(SIZES)}")
        return [to_problem(record["id"], record["question"], record["answer"]) for record in problems(split, limit)]
