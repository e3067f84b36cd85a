"""Finished work on disk, entry by entry, so that a killed run can resume; one run at a time (claim.py).

A journal is a folder with one shard per process: an append-only file whose lines are a checksum and a JSON object each.
The first line is a header with the run's config and the digests of its inputs (inputs.py), every other line an entry. A
kill can only tear the last line, and checksums detect damaged lines. Any process may finish any entry, so a resumed run
can have another number of processes.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from llm2.common.inputs import Digests, record, require_same
from llm2.errors import UserError

CHECKSUM = 9  # bytes: eight digits and a space


class Journal:
    """One process's handle on the journal in `folder`; `done` holds the keys of all finished entries it has read.

    Args:
        config, inputs: the run's config and digests; raises UserError if non-empty shards were written with others
            (`require_same`).
        key: identifies an entry.
        shard: the number of this process, the only writer of that shard.
    """

    def __init__(
        self,
        folder: Path,
        config: Any,
        inputs: Digests,
        *,
        key: Callable[[dict], Hashable],
        shard: int = 0,
    ) -> None:
        self.folder, self.key = folder, key
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / f"shard-{shard}.jsonl").open("a+b")
        for path in self._shards():
            self._check_header(path, config, inputs)
        self._repair(record(config, inputs))
        self.done = set(self._offsets())

    def add(self, entry: dict) -> None:
        """Write one entry; once this returns, it survives a kill of this process."""
        self._write(entry)
        self.done.add(self.key(entry))

    def read(self, keys: Iterable[Hashable]) -> Iterator[dict]:
        """The entries of `keys`, in that order, from all shards; one in memory at a time. Raises KeyError."""
        offsets = self._offsets()
        for key in keys:
            path, offset = offsets[key]
            with path.open("rb") as file:
                file.seek(offset)
                yield json.loads(file.readline()[CHECKSUM:])

    def close(self) -> None:
        self.file.close()

    def discard(self) -> None:
        """Delete the folder, once its entries are stored elsewhere."""
        self.close()
        shutil.rmtree(self.folder)

    def _write(self, content: dict) -> None:
        text = json.dumps(content, ensure_ascii=False).encode()
        line = memoryview(_checksum(text) + text + b"\n")
        try:
            while line:  # unbuffered, so that nothing is pending if the disk is full
                line = line[os.write(self.file.fileno(), line) :]
        except OSError as error:
            error.filename = self.file.name
            raise

    def _repair(self, header: dict) -> None:
        """Cut off a torn last line; write the header if the shard has no entry."""
        ends = [start + len(line) for start, line in _complete_lines(self.file)]
        self.file.truncate(ends[-1] if len(ends) > 1 else 0)
        if len(ends) < 2:
            self._write(header)

    def _shards(self) -> list[Path]:
        return sorted(self.folder.glob("shard-*.jsonl"))

    def _check_header(self, path: Path, config: Any, inputs: Digests) -> None:
        with path.open("rb") as file:
            lines = [line for _, line in islice(_complete_lines(file), 2)]
        if len(lines) > 1:
            way_out = f"set that back, or delete {self.folder}"
            require_same(_parse(lines[0], path, 1), config, inputs, f"the journal {path}", way_out)

    def _offsets(self) -> dict[Hashable, tuple[Path, int]]:
        """Key of every finished entry -> its shard and its offset there in bytes."""
        offsets = {}
        for path in self._shards():
            with path.open("rb") as file:
                for number, (start, line) in enumerate(_complete_lines(file), start=1):
                    if number > 1:
                        offsets[self.key(_parse(line, path, number))] = path, start
        return offsets


def _complete_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Offset and content of every line that ends in a newline: all but a torn last one."""
    file.seek(0)
    start = 0
    for line in file:
        if not line.endswith(b"\n"):
            return
        yield start, line
        start += len(line)


def _checksum(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x} ".encode()


def _parse(line: bytes, path: Path, number: int) -> dict:
    text = line[CHECKSUM:-1]
    if line[:CHECKSUM] != _checksum(text):
        raise UserError(
            f"{path}, line {number}: expected an entry and its checksum, found the damaged line {line[:40]!r}; "
            f"delete {'that line' if number > 1 else 'the file'}, and what it held is computed again"
        )
    return json.loads(text)
