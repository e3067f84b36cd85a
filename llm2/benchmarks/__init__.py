"""Problems with gold solutions, as the rest of the project asks for them: one dataclass, one loading function.

Knows what a problem is and turns GSM8K-style records into problems. Leaves where the records come from to gsm8k.py and
wordproblems.py, and grading to llm2/grading.py.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from llm2.benchmarks import gsm8k, wordproblems
from llm2.errors import UserError

# Each takes (split, limit) and returns records {"id", "question", "answer"}.
SOURCES: dict[str, Callable[[str, int | None], Iterable[dict]]] = {
    "gsm8k": gsm8k.hub_records,
    "testbed": wordproblems.generated_records,
}


@dataclass(frozen=True)
class Problem:
    """A question, a worked solution as chat text that ends in `So the answer is N.`, and the number N."""

    id: str
    question: str
    solution: str
    gold: str

    @property
    def prompt(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}]

    @property
    def conversation(self) -> list[dict[str, str]]:
        return [*self.prompt, {"role": "assistant", "content": self.solution}]


def load_problems(benchmark: str, split: str, limit: int | None = None, data_file: str | None = None) -> list[Problem]:
    """The first `limit` problems (all when None) of a benchmark's split.

    Args:
        benchmark: a key of SOURCES.
        split: a split of that benchmark; with a data_file only the prefix of the ids that the file does not give.
        data_file: local JSON lines in GSM8K's format, read in place of the benchmark's own source, never a network.

    Raises UserError in one sentence for whatever the user can mend.
    """
    if benchmark not in SOURCES:
        raise UserError(f"unknown benchmark {benchmark!r}: expected one of {', '.join(SOURCES)}")
    if data_file is not None:
        return [problem_of(record) for record in gsm8k.file_records(data_file, split, limit)]
    return [problem_of(record) for record in SOURCES[benchmark](split, limit)]


def problem_of(record: dict) -> Problem:
    """A problem of a GSM8K-style record {"id", "question", "answer"}."""
    steps, gold = gsm8k.steps_and_gold(record["answer"])
    solution = " ".join([*steps, f"So the answer is {gold}."])
    return Problem(record["id"], record["question"], solution, gold)
