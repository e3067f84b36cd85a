"""UserError, and the conversion of errors from files, weights, tokenizers and user code into one-sentence messages."""

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError


class UserError(Exception):
    """A user's mistake in one sentence: found and expected. The command line prints it and exits with status 2."""


@contextmanager
def as_user_error(what: str, hint: str = "") -> Iterator[None]:
    """Turn any exception raised inside into the UserError `WHAT: the reason; HINT`.

    For user code and for files read by libraries, whose exception types are unstable.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {reason(error)}{f'; {hint}' if hint else ''}") from error


def reason(error: Exception) -> str:
    """The message of an error, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = shorten(said[0] + (f" {said[1]}" if said[0].endswith(":") and said[1:] else ""), 300) if said else ""
    speaks = isinstance(error, OSError | ValueError | RuntimeError) and text  # others may be just a key
    return text if speaks else f"{type(error).__name__}{f': {text}' if text else ''}"


def first_misfit(error: ValidationError) -> str:
    """The first field that does not fit, and how, in one clause."""
    first = error.errors()[0]
    return f"{first['loc'][0]}: {misfit(first)}"


def misfit(detail: Mapping[str, Any]) -> str:
    """Found and expected, of one of the errors that a ValidationError holds."""
    return f"found {quote(detail['input'])}, expected: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def origin(error: Exception) -> str:
    """File and line of the code that raised an error."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}, line {frame.lineno}"


def of_the_machine(error: Exception) -> str | None:
    """The message of an environment error (disk, network, lost processes); None for any other error."""
    if isinstance(error, OSError):
        return reason(error)
    writers = ("PytorchStreamWriter", "inline_container", "iostream error", "unexpected pos")  # torch.save
    if type(error).__name__ == "SafetensorError" or any(word in str(error) for word in writers):
        return f"weights could not be read or written, is the disk full? {reason(error)}"
    if type(error).__name__.startswith("Dist") or "Connection closed by peer" in str(error):  # torch.distributed, gloo
        return f"the processes of this run lost each other; one that failed says why: {reason(error)}"
    return None


def quote(value: Any) -> str:
    """The repr of a value, shortened, for errors."""
    try:
        return shorten(repr(value), 100)
    except (ValueError, RecursionError):  # an integer of too many digits, too deep a nesting
        return f"a {type(value).__name__}"


def shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"
