"""The journal: torn lines, other configs, other numbers of processes."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest

from llm2.common.journal import Journal
from llm2.errors import UserError


@dataclass(frozen=True)
class Config:
    seed: int = 0
    device: str = "cpu"


BEGUN = Config()


def opened(folder, config=BEGUN, shard=0) -> Journal:
    return Journal(folder, config, may_differ=("device",), key=lambda entry: entry["id"], shard=shard)


def test_entries_come_back_in_the_order_asked_for_from_whatever_shard(tmp_path):
    journals = [opened(tmp_path / "run", shard=shard) for shard in range(3)]
    for i in range(7):
        journals[i % 3].add({"id": i, "text": "é\n" * i})
    for journal in journals:
        journal.close()
    again = opened(tmp_path / "run")
    assert again.done == set(range(7))
    assert list(again.read([5, 0, 6])) == [{"id": i, "text": "é\n" * i} for i in (5, 0, 6)]
    with pytest.raises(KeyError):
        list(again.read([7]))
    again.discard()
    assert not (tmp_path / "run").exists()


def test_a_kill_at_any_byte_loses_at_most_the_entry_that_was_being_written(tmp_path):
    journal = opened(tmp_path / "whole")
    for i in range(3):
        journal.add({"id": i})
    journal.close()
    (path,) = (tmp_path / "whole").iterdir()
    whole = path.read_bytes()
    for length in range(len(whole)):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / path.name).write_bytes(whole[:length])
        complete = max(whole[:length].count(b"\n") - 1, 0)
        other = opened(folder, shard=1)  # a process that does not own the torn shard reads over the tear
        assert other.done == set(range(complete))
        other.close()
        torn = opened(folder)
        assert torn.done == set(range(complete))
        for i in range(complete, 3):
            torn.add({"id": i})
        torn.close()
        assert (folder / path.name).read_bytes() == whole


def test_another_config_is_refused_but_for_the_free_keys(tmp_path):
    opened(tmp_path, shard=3).close()
    opened(tmp_path, replace(BEGUN, device="cuda")).close()
    with pytest.raises(UserError, match=r"shard-0.jsonl was begun with another config: seed was 0 and now is 1"):
        opened(tmp_path, replace(BEGUN, seed=1))


def test_a_shard_has_one_writer(tmp_path):
    opened(tmp_path).close()
    code = "import fcntl, sys; f = open(sys.argv[1], 'a+b'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "shard-0.jsonl"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    with pytest.raises(UserError, match="being written by another run"):
        opened(tmp_path)
    holder.communicate(b"\n")
    opened(tmp_path).close()


def test_a_damaged_line_is_told_with_its_number(tmp_path):
    journal = opened(tmp_path)
    journal.add({"id": 0})
    journal.close()
    path = tmp_path / "shard-0.jsonl"
    path.write_bytes(path.read_bytes() + b"not json\n" + json.dumps({"id": 1}).encode() + b"\n")
    with pytest.raises(UserError, match=r"shard-0.jsonl, line 3: expected a JSON object, found b'not json"):
        opened(tmp_path)
