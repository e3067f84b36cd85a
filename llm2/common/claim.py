"""One run at a time on an output: the second fails, naming the first."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from llm2.common.distributed import dist_info
from llm2.errors import UserError


@contextmanager
def lock_output(output: str | Path, is_file: bool = False) -> Iterator[None]:
    """Hold the lock OUTPUT/.lock (OUTPUT.lock for a file) while this block runs; a kill releases it.

    The main process holds it for all processes. Raises UserError if another run holds it, with that run's process,
    machine and start.
    """
    if not dist_info().is_main:
        yield
        return
    lock = Path(f"{output}.lock") if is_file else Path(output, ".lock")
    made = not lock.parent.exists()
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = _try_lock(lock)
    if file is None:
        owner = lock.read_text(encoding="utf-8") if lock.exists() else ""
        raise UserError(
            f"{output} is being written by another run ({owner or 'which has just begun'}); wait for it, or end it"
        )
    try:
        file.truncate(0)
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}".encode())
        file.flush()
        yield
    finally:
        lock.unlink(missing_ok=True)  # before it is released: see _try_lock
        file.close()
        if made and not any(lock.parent.iterdir()):
            lock.parent.rmdir()


def _try_lock(path: Path) -> BinaryIO | None:
    """The locked file; None if another process holds it.

    A POSIX lock, since worker processes do not inherit it: any other kind would stay held by a worker that outlives a
    killed run.
    """
    while True:
        file = path.open("a+b")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            return None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # its owner deleted it after it was opened here
