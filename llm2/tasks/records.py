"""Records of problems, from local JSON lines or from the hub.

Knows what can be wrong with a file or a hub, and says it in one sentence. Leaves what the records mean to the
benchmarks.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from llm2.errors import UserError

HUB_TIMEOUT = 5.0  # seconds; a hub that is there answers within one


def read_records(path: str, keys: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    """Each record of a JSON lines file, which must hold these keys as texts, and where it stands."""
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _parse(line, where, keys)
    except OSError as error:
        raise UserError(f"cannot read the problems {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, found byte {error.object[error.start]:#04x}") from None


def hub_rows(dataset: str, split: str, subset: str | None = None) -> Iterable[dict]:
    """A split of a dataset from the hub or its local cache."""
    import datasets  # takes a second, and a local file needs none of it

    if not hub_answers(dataset):  # straight to the cache then; retrying a hub that is not there takes half a minute
        datasets.config.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(*filter(None, [dataset, subset]), split=split)
    except (OSError, ValueError):  # the hub's errors are OSErrors; a ValueError: cached, but not this part of it
        raise UserError(
            f"{dataset} is not in the local cache and the Hugging Face hub cannot be reached: "
            "set data_file=<local JSON lines in its format>, "
            "or run `bash scripts/quickstart.sh`, which needs no download"
        ) from None


def hub_answers(dataset: str) -> bool:
    """One request without retries."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(dataset, timeout=HUB_TIMEOUT)
    except Exception:  # no network, a refusing proxy, HF_HUB_OFFLINE; the class depends on the hub's HTTP library
        return False
    return True


def _parse(line: str, where: str, keys: tuple[str, ...]) -> dict:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        expected = " and ".join(f"`{key}`" for key in keys)
        raise UserError(f"{where}: expected an object with {expected}, found a {type(record).__name__}")
    for key in keys:
        if key not in record:
            found = ", ".join(map(repr, record)) or "no keys"
            raise UserError(f"{where}: expected the key {key!r}, found {found}")
        if not isinstance(record[key], str):
            raise UserError(f"{where}: {key!r} must be a text, found {record[key]!r}")
    return record
