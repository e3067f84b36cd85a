r"""GSM8K: its record format, and its records from the hub or from a local file.

Knows the format, {"question": ..., "answer": "a step a line with <<48/2=24>> annotations\n#### 72"}, and what can be
wrong with a file of it. Leaves what a problem looks like to the model to the package above.
"""

import json
import re
from itertools import islice
from pathlib import Path

from llm2.errors import UserError
from llm2.grading import extract_answer

DATASET = "openai/gsm8k"
SPLITS = ("train", "test")
HUB_TIMEOUT = 5.0  # seconds; a hub that is there answers within one

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
    """The records of a JSON lines file, with the ids that it gives or else SPLIT-INDEX; blank lines are skipped."""
    records = []
    try:
        with Path(path).open(encoding="utf-8") as lines:
            numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
            for index, (number, line) in enumerate(islice(numbered, limit)):
                record = _parse(line, f"{path}, line {number}")
                records.append({"id": str(record.get("id", f"{split}-{index}")), **_texts(record)})
    except OSError as error:
        raise UserError(f"cannot read the problems {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, found byte {error.object[error.start]:#04x}") from None
    return records


def hub_records(split: str, limit: int | None = None) -> list[dict]:
    """GSM8K itself, from the hub or its local cache."""
    if split not in SPLITS:
        raise UserError(f"gsm8k has no split {split!r}: expected one of {', '.join(SPLITS)}")
    import datasets  # takes a second, and a local file needs none of it

    if not _hub_answers():  # straight to the cache then; retrying a hub that is not there takes half a minute
        datasets.config.HF_HUB_OFFLINE = True
    try:
        rows = datasets.load_dataset(DATASET, "main", split=split)
    except (OSError, ValueError):  # the hub's errors are OSErrors; a ValueError: cached, but not this part of it
        raise UserError(
            f"{DATASET} is not in the local cache and the Hugging Face hub cannot be reached: "
            "set data_file=<local JSON lines of GSM8K>, or run `bash scripts/quickstart.sh`, which needs no download"
        ) from None
    return [
        {"id": f"{split}-{index}", "question": row["question"], "answer": row["answer"]}
        for index, row in enumerate(islice(rows, limit))
    ]


def _hub_answers() -> bool:
    """One request without retries."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(DATASET, timeout=HUB_TIMEOUT)
    except Exception:  # no network, a refusing proxy, HF_HUB_OFFLINE; the class depends on the hub's HTTP library
        return False
    return True


def _parse(line: str, where: str) -> dict:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with `question` and `answer`, found a {type(record).__name__}")
    for key in ("question", "answer"):
        if key not in record:
            found = ", ".join(map(repr, record)) or "no keys"
            raise UserError(f"{where}: expected the key {key!r}, found {found}")
        if not isinstance(record[key], str):
            raise UserError(f"{where}: {key!r} must be a text, found {record[key]!r}")
    try:
        steps_and_gold(record["answer"])
    except ValueError:
        end = record["answer"][-40:]
        raise UserError(f"{where}: 'answer' must end in `#### number`, found {end!r} at its end") from None
    return record


def _texts(record: dict) -> dict[str, str]:
    return {"question": record["question"], "answer": record["answer"]}
