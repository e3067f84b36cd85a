"""The journal: torn lines, changed configs, other numbers of processes."""

import json
from dataclasses import replace
from typing import Annotated

import pytest
from pydantic.dataclasses import dataclass

from llm2.common.journal import Journal
from llm2.common.keys import Mark
from llm2.errors import UserError


@dataclass(frozen=True)
class Config:
    seed: int = 0
    device: Annotated[str, Mark.HOW] = "cpu"


CONFIG = Config()


def open_journal(folder, config=CONFIG, shard=0) -> Journal:
    return Journal(folder, config, {}, key=lambda entry: entry["id"], shard=shard)


def test_entries_are_read_in_the_given_order_from_all_shards(tmp_path):
    journals = [open_journal(tmp_path / "run", shard=shard) for shard in range(3)]
    for i in range(7):
        journals[i % 3].add({"id": i, "text": "é\n" * i})
    for journal in journals:
        journal.close()
    again = open_journal(tmp_path / "run")
    assert again.done == set(range(7))
    assert list(again.read([5, 0, 6])) == [{"id": i, "text": "é\n" * i} for i in (5, 0, 6)]
    with pytest.raises(KeyError):
        list(again.read([7]))
    again.discard()
    assert not (tmp_path / "run").exists()


def test_a_kill_at_any_byte_loses_at_most_the_entry_being_written(tmp_path):
    journal = open_journal(tmp_path / "whole")
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
        other = open_journal(folder, shard=1)  # another process skips the torn line
        assert other.done == set(range(complete))
        other.close()
        torn = open_journal(folder)
        assert torn.done == set(range(complete))
        for i in range(complete, 3):
            torn.add({"id": i})
        torn.close()
        assert (folder / path.name).read_bytes() == whole


def test_another_config_is_refused_except_for_keys_that_may_differ(tmp_path):
    open_journal(tmp_path, shard=3).close()
    journal = open_journal(tmp_path, replace(CONFIG, seed=1, device="cuda"))
    journal.close()
    journal = open_journal(tmp_path)  # without an entry it binds nobody
    journal.add({"id": 1})
    journal.close()
    open_journal(tmp_path, replace(CONFIG, device="cuda")).close()
    with pytest.raises(UserError, match=r"shard-0.jsonl is of another config: seed was 0 and now is 1"):
        open_journal(tmp_path, replace(CONFIG, seed=1))


def test_a_damaged_line_is_reported_with_its_number(tmp_path):
    journal = open_journal(tmp_path)
    journal.add({"id": 0})
    journal.close()
    path = tmp_path / "shard-0.jsonl"
    path.write_bytes(path.read_bytes() + b"not json\n" + json.dumps({"id": 1}).encode() + b"\n")
    with pytest.raises(UserError, match=r"shard-0.jsonl, line 3: expected an entry and its checksum, found the"):
        open_journal(tmp_path)


def test_a_changed_digit_never_becomes_another_entry(tmp_path):
    journal = open_journal(tmp_path)
    journal.add({"id": 3, "answer": 17})
    journal.close()
    path = tmp_path / "shard-0.jsonl"
    path.write_bytes(path.read_bytes().replace(b"17", b"11"))
    with pytest.raises(UserError, match=r"shard-0.jsonl, line 2: .* delete that line, and what it held is computed"):
        open_journal(tmp_path)
