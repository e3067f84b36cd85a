r"""GSM8K: its record format, and its records from the hub or from a local file.

Knows the format, {"question": ..., "answer": "a step a line with <<48/2=24>> annotations\n#### 72"}, and its splits.
Leaves what a problem looks like to the model to the package above.
"""

import re
from itertools import islice

from llm2.errors import UserError
from llm2.tasks.grading import extract_answer
from llm2.tasks.records import hub_rows, read_records

DATASET = "openai/gsm8k"
SPLITS = ("train", "validation", "test")
VALIDATION = 473  # the last of the 7,473 training problems: explore with limit=7000 to keep them unseen

_ANNOTATION = re.compile(r"<<[^<>\n]*>>")


def steps_and_gold(answer: str) -> tuple[list[str], str]:
    """The worked steps without their annotations, and the number after `####`; ValueError where there is none."""
    worked, marker, _ = answer.rpartition("####")
    gold = extract_answer(answer[len(worked) :], "strict") if marker else None
    if gold is None:
        raise ValueError("no `#### number`")
    lines = (_ANNOTATION.sub("", line).strip() for line in worked.splitlines())
    return [line for line in lines if line], gold


def file_records(path: str, split: str, limit: int | None = None) -> list[dict]:
    """The records of a JSON lines file, with the ids that it gives or else SPLIT-INDEX."""
    records = []
    for index, (where, record) in enumerate(islice(read_records(path, ("question", "answer")), limit)):
        try:
            steps_and_gold(record["answer"])
        except ValueError:
            end = record["answer"][-40:]
            raise UserError(f"{where}: 'answer' must end in `#### number`, found {end!r} at its end") from None
        name = str(record.get("id", f"{split}-{index}"))
        records.append({"id": name, "question": record["question"], "answer": record["answer"]})
    return records


def hub_records(split: str, limit: int | None = None) -> list[dict]:
    """GSM8K itself, from the hub or its local cache; its validation split is the end of its training problems."""
    if split not in SPLITS:
        raise UserError(f"gsm8k has no split {split!r}: expected one of {', '.join(SPLITS)}")
    rows = hub_rows(DATASET, "test" if split == "test" else "train", "main")
    if split == "validation":
        rows = list(rows)[-VALIDATION:]
    return [
        {"id": f"{split}-{index}", "question": row["question"], "answer": row["answer"]}
        for index, row in enumerate(islice(rows, limit))
    ]
