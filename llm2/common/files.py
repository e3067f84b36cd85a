"""Read text files, and write files atomically: written beside the target, synced, renamed."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TextIO

from llm2.errors import UserError


def read_text(path: str | Path, what: str) -> str:
    """Read a UTF-8 file, with or without a byte order mark. Raises UserError; `what` names the expected content."""
    with reading(path, what):
        return Path(path).read_text(encoding="utf-8-sig")


@contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """Convert errors of this block to a UserError: `path`, expected to hold `what`, is unreadable or not UTF-8."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, found byte {error.object[error.start]:#04x}") from error


@contextmanager
def whole_file(path: str | Path) -> Iterator[TextIO]:
    """Open a text file that replaces `path` once it is written without an error."""
    path = Path(path)
    new = path.with_name(f".{path.name}.new")  # a fixed name: the next run overwrites the file of a killed one
    try:
        with new.open("w", encoding="utf-8") as file:
            yield file
        _put(new, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # not set if the disk is full
        raise
    finally:
        new.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text)


def write_bytes(path: str | Path, content: bytes) -> None:
    with whole_file(path) as file:
        file.buffer.write(content)


@contextmanager
def whole_files(folder: str | Path, is_main: bool = True) -> Iterator[Path]:
    """An empty folder for a library to write to; afterwards its files are moved to `folder`.

    config.json is moved last, so a folder with a config.json is complete. Only the main process creates the folder and
    moves the files.
    """
    folder = Path(folder)
    new = folder / ".new"
    if not is_main:
        yield new
        return
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        for path in sorted(new.iterdir(), key=lambda path: (path.name == "config.json", path.name)):
            _put(path, folder / path.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _put(new: Path, path: Path) -> None:
    _sync(new)
    os.replace(new, path)
    _sync(path.parent)  # otherwise a power cut could undo the rename


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    state = path.stat()
    return _digest(path, state.st_ino, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)  # a study asks for the same System 1 at each of its steps
def _digest(path: Path, *state: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
