"""Read JSON Lines files, one object per line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm2.common.files import reading
from llm2.errors import UserError, quote, shorten


def read_jsonl(
    path: str | Path, what: str = "records", text_keys: tuple[str, ...] = (), skip_torn_line: bool = False
) -> Iterator[tuple[int, dict]]:
    """The line number (from 1) and the object of each line that is not blank; a byte order mark is skipped.

    Args:
        what: the file's content, for error messages.
        text_keys: keys that every object must have, with string values.
        skip_torn_line: skip a last line without a newline, left by a killed process.

    Raises UserError with file and line if the file cannot be read or is malformed.
    """
    with reading(path, what), open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() and not (skip_torn_line and not line.endswith("\n")):
                yield number, _parse(line, f"{path}, line {number}", text_keys)


def parse_json(text: str, where: str) -> Any:
    """Parse JSON. Raises UserError, prefixed with `where`, if it is invalid or holds text that is not valid Unicode."""
    try:
        value = json.loads(text, parse_constant=_refuse, object_pairs_hook=_distinct)
        if "\\ud" in text.lower():  # JSON can escape a lone surrogate
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise UserError(f"{where}: not valid JSON: nested too deeply") from None
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: expected Unicode text, found {ascii(error.object[error.start])}") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    return value


def _parse(line: str, where: str, text_keys: tuple[str, ...]) -> dict:
    record = parse_json(line, where)
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object, found a {type(record).__name__}")
    for key in text_keys:
        if key not in record:
            keys = shorten(", ".join(map(repr, record)) or "no keys", 100)
            raise UserError(f"{where}: expected the key {key!r}, found {keys}")
        if not isinstance(record[key], str):
            raise UserError(f"{where}: key {key!r}: expected a text, found {quote(record[key])}")
    return record


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _distinct(pairs: list[tuple[str, Any]]) -> dict:
    record = dict(pairs)
    if len(record) < len(pairs):  # json would silently take the last value
        key = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"the key {key!r} stands twice in one object")
    return record
