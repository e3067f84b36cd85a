r"""GSM8K: {"question": ..., "answer": "a step a line with <<48/2=24>> annotations\n#### 72"}."""

import re
from collections.abc import Callable
from itertools import islice

from llm2.common.jsonl import read_jsonl
from llm2.errors import UserError
from llm2.tasks.grading import extract_answer
from llm2.tasks.hub import hub_rows
from llm2.tasks.task import NumberTask, Problem

DATASET = "openai/gsm8k"
SPLITS = ("train", "validation", "test")
VALIDATION = 473  # the last of the 7,473 training problems: explore with limit=7000 to keep them unseen

ANNOTATION = re.compile(r"<<[^<>\n]*>>")


class GSM8K(NumberTask):
    """Grade-school word problems (Cobbe et al., arXiv 2110.14168), from the hub or a file of the same format."""

    def problems(self, split: str, limit: int | None = None) -> list[Problem]:
        return self.source(split, limit) if self.data_file is None else read_problems(self.data_file, split, limit)

    def source(self, split: str, limit: int | None) -> list[Problem]:
        """Problems from the hub; the validation split is the end of the training problems."""
        if split not in SPLITS:
            raise UserError(f"gsm8k has no split {split!r}: expected one of {', '.join(SPLITS)}")
        rows = hub_rows(DATASET, "test" if split == "test" else "train", "main")
        if split == "validation":
            rows = list(rows)[-VALIDATION:]
        return [
            to_problem(f"{split}-{index}", row["question"], row["answer"])
            for index, row in enumerate(islice(rows, limit))
        ]


def read_problems(
    path: str, split: str, limit: int | None = None, read: Callable[[str, str, str], Problem] | None = None
) -> list[Problem]:
    """The problems of a JSON Lines file; an id is the record's `id`, else SPLIT-INDEX.

    Args:
        read: makes a problem from id, question and answer, as `to_problem` does.
    """
    problems = []
    for index, (line, record) in enumerate(islice(read_jsonl(path, "problems", ("question", "answer")), limit)):
        name = str(record.get("id", f"{split}-{index}"))
        try:
            problems.append((read or to_problem)(name, record["question"], record["answer"]))
        except ValueError:
            end = record["answer"][-40:]
            raise UserError(
                f"{path}, line {line}: key 'answer': expected `#### number` at its end, found {end!r}"
            ) from None
    return problems


def to_problem(name: str, question: str, answer: str) -> Problem:
    """The steps without their annotations become the solution, which ends in `So the answer is N.`

    Raises ValueError if the answer does not end in `#### number`.
    """
    steps_text, gold = split_answer(answer)
    steps = (ANNOTATION.sub("", line).strip() for line in steps_text.splitlines())
    return Problem(name, question, gold, " ".join([*filter(None, steps), f"So the answer is {gold}."]))


def split_answer(answer: str) -> tuple[str, str]:
    """The text before `#### number`, and the number. Raises ValueError if the answer has another form."""
    text, marker, _ = answer.rpartition("####")
    gold = extract_answer(answer[len(text) :], "strict") if marker else None
    if gold is None:
        raise ValueError("no `#### number`")
    return text, gold
