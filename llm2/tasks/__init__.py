"""Problems with gold solutions, as the rest of the project asks for them: one dataclass, one loading function.

Knows what a problem is, turns records into problems, and which grader a benchmark has. Leaves where the records come
from to gsm8k.py, math500.py and testbed.py, and reading numbers to llm2/tasks/grading.py.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from llm2.errors import UserError
from llm2.tasks import gsm8k, math500, testbed
from llm2.tasks.grading import Grade, grade_numbers

# Each takes (split, limit) and returns records: {"id", "question", "answer"}, for math500 "gold" and "instruction" too.
SOURCES: dict[str, Callable[[str, int | None], Iterable[dict]]] = {
    "gsm8k": gsm8k.hub_records,
    "math500": math500.hub_records,
    "testbed": testbed.generated_records,
}
Grader = Callable[[Sequence[str], str], list[Grade]]  # (solutions of a problem, its gold answer) -> a grade each


@dataclass(frozen=True)
class Problem:
    """A question, a worked solution as chat text, and the gold answer: a number, for MATH-500 LaTeX."""

    id: str
    question: str
    solution: str
    gold: str
    instruction: str = ""  # what the prompt asks for besides: the answer's format, where that is usual

    @property
    def prompt(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": "\n\n".join(filter(None, [self.question, self.instruction]))}]

    @property
    def conversation(self) -> list[dict[str, str]]:
        return [*self.prompt, {"role": "assistant", "content": self.solution}]


def load_problems(benchmark: str, split: str, limit: int | None = None, data_file: str | None = None) -> list[Problem]:
    """The first `limit` problems (all when None) of a benchmark's split.

    Args:
        benchmark: a key of SOURCES.
        split: a split of that benchmark; with a data_file only the prefix of the ids that the file does not give.
        data_file: local JSON lines in the benchmark's format (GSM8K's for the testbed), read in place of the
            benchmark's own source, never a network.

    Raises UserError in one sentence for whatever the user can mend.
    """
    if benchmark not in SOURCES:
        raise UserError(f"unknown benchmark {benchmark!r}: expected one of {', '.join(SOURCES)}")
    if benchmark == "math500":
        records = math500.file_records(data_file, split, limit) if data_file else math500.hub_records(split, limit)
        return [Problem(**record) for record in records]
    if data_file is not None:
        return [problem_of(record) for record in gsm8k.file_records(data_file, split, limit)]
    return [problem_of(record) for record in SOURCES[benchmark](split, limit)]


def problem_of(record: dict) -> Problem:
    """A problem of a GSM8K-style record {"id", "question", "answer"}; its solution ends in `So the answer is N.`"""
    steps, gold = gsm8k.steps_and_gold(record["answer"])
    solution = " ".join([*steps, f"So the answer is {gold}."])
    return Problem(record["id"], record["question"], solution, gold)


def grader_of(benchmark: str) -> Grader:
    """The benchmark's grader; MATH-500's holds processes of its own, which end with this one."""
    return math500.MathGrader() if benchmark == "math500" else grade_numbers
