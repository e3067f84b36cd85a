"""A user's mistake, and the one place where errors of files, weights, tokenizers and a user's code become sentences."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """A user's mistake in one sentence: found and expected. The command line prints it and exits with status 2."""


@contextmanager
def explained(what: str, hint: str = "") -> Iterator[None]:
    """Whatever is raised within becomes the UserError `WHAT: the reason; HINT`.

    For what libraries read for us and for code of the user's: the classes of their errors are no contract.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {reason(error)}{f'; {hint}' if hint else ''}") from error


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = shortened(said[0] + (f" {said[1]}" if said[0].endswith(":") and said[1:] else ""), 300) if said else ""
    speaks = isinstance(error, OSError | ValueError | RuntimeError) and text  # others say a key or nothing at all
    return text if speaks else f"{type(error).__name__}{f': {text}' if text else ''}"


def origin(error: Exception) -> str:
    """File and line of the code that raised an error."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}, line {frame.lineno}"


def of_the_machine(error: Exception) -> str | None:
    """The sentence of an error that is no defect of the program, such as a full disk; None of any other."""
    if isinstance(error, OSError):
        return reason(error)
    writers = ("PytorchStreamWriter", "inline_container", "iostream error", "unexpected pos")  # torch.save
    if type(error).__name__ == "SafetensorError" or any(word in str(error) for word in writers):
        return f"weights could not be read or written, is the disk full? {reason(error)}"
    if type(error).__name__.startswith("Dist") or "Connection closed by peer" in str(error):  # torch.distributed, gloo
        return f"the processes of this run lost each other; one that failed says why: {reason(error)}"
    return None


def shown(value: Any) -> str:
    """A value as an error quotes it: its repr, shortened."""
    try:
        return shortened(repr(value), 100)
    except (ValueError, RecursionError):  # an integer of too many digits, too deep a nesting
        return f"a {type(value).__name__}"


def shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"
