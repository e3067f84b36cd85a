"""The embedded testbed (llm2/testbed): word problems in GSM8K's format."""

from llm2.errors import UserError
from llm2.tasks.gsm8k import GSM8K, to_problem
from llm2.tasks.task import Problem
from llm2.testbed.generator import SAME, SIZES, problems


class Testbed(GSM8K):
    """Generated word problems, always the same ones. Subclasses may set another regime."""

    __test__ = False  # not a test class, for pytest
    regime = SAME

    def source(self, split: str, limit: int | None) -> list[Problem]:
        if split not in SIZES:
            raise UserError(f"testbed has no split {split!r}: expected one of {', '.join(SIZES)}")
        return [
            to_problem(record["id"], record["question"], record["answer"])
            for record in problems(split, limit, self.regime)
        ]
