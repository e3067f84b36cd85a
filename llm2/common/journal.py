"""What a long run has finished, on disk entry by entry, so that a killed run goes on where it stopped.

A journal is a folder of shards, one a process: JSON lines that are only ever appended to, behind a header, the config
they were begun with. A kill may tear the last line of a shard; nothing else is ever in doubt. Which process finished
what does not matter afterwards: a resumed run may have another number of processes. Knows nothing of what entries mean.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

from llm2.common.config_file import as_dict, difference
from llm2.errors import UserError


class Journal:
    """One process's hand on the journal in `folder`.

    Args:
        config: of the run; shards of a run with another one are refused, but for the keys that are `may_differ` to change.
        key: what identifies an entry.
        shard: the number of this process; it alone writes to that shard.

    `done` holds the keys of all whole entries that any process had written when this journal was opened, and those
    added since.
    """

    def __init__(
        self, folder: Path, config: Any, *, may_differ: tuple[str, ...], key: Callable[[dict], Hashable], shard: int = 0
    ) -> None:
        self.folder, self.key = folder, key
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / f"shard-{shard}.jsonl").open("a+b")
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.file.name} is being written by another run; wait for it, or end it") from None
        for path in self._shards():
            self._refuse_other(path, config, may_differ)
        self._mend(as_dict(config))
        self.done = set(self._places())

    def add(self, entry: dict) -> None:
        """Write one entry; it survives whatever happens to this process from now on."""
        self._write(entry)
        self.done.add(self.key(entry))

    def read(self, order: Iterable[Hashable]) -> Iterator[dict]:
        """The entries of these keys from all shards, in this order, one in memory at a time.

        Raises KeyError for a key that no process has finished.
        """
        places = self._places()
        for key in order:
            path, offset = places[key]
            with path.open("rb") as file:
                file.seek(offset)
                yield json.loads(file.readline())

    def close(self) -> None:
        self.file.close()

    def discard(self) -> None:
        """Delete the folder, once its entries live elsewhere."""
        self.close()
        shutil.rmtree(self.folder)

    def _write(self, content: dict) -> None:
        self.file.write(json.dumps(content, ensure_ascii=False).encode() + b"\n")
        self.file.flush()

    def _mend(self, header: dict) -> None:
        """Cut what a kill left of a last line; begin an empty shard with its header."""
        end = max((end for end, _ in _whole_lines(self.file)), default=0)
        self.file.truncate(end)
        if end == 0:
            self._write(header)

    def _shards(self) -> list[Path]:
        return sorted(self.folder.glob("shard-*.jsonl"))

    def _refuse_other(self, path: Path, config: Any, may_differ: tuple[str, ...]) -> None:
        with path.open("rb") as file:
            _, header = next(_whole_lines(file), (0, None))
        if header is not None and (change := difference(_parse(header, path, 1), config, may_differ)):
            raise UserError(f"{path} was begun with another config: {change}; set that back, or delete {self.folder}")

    def _places(self) -> dict[Hashable, tuple[Path, int]]:
        """Key of every whole entry -> its shard and where it begins there, in bytes."""
        places = {}
        for path in self._shards():
            with path.open("rb") as file:
                begin = 0
                for number, (end, line) in enumerate(_whole_lines(file), start=1):
                    if number > 1:
                        places[self.key(_parse(line, path, number))] = path, begin
                    begin = end
        return places


def _whole_lines(file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Each line with the offset at which it ends; not a last one that lacks its newline."""
    file.seek(0)
    end = 0
    for line in file:
        if not line.endswith(b"\n"):
            return
        end += len(line)
        yield end, line


def _parse(line: bytes, path: Path, number: int) -> dict:
    try:
        return json.loads(line)
    except ValueError:
        raise UserError(f"{path}, line {number}: expected a JSON object, found {line[:40]!r}") from None
