"""One run at a time on an output, and files that appear whole or not at all."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from llm2.common.claim import lock_output
from llm2.common.files import read_text, whole_file, whole_files, write_bytes, write_text
from llm2.errors import UserError

HOLD = """
import os, sys
from llm2.common.claim import lock_output
with lock_output(sys.argv[1], is_file=sys.argv[2] == "file"):
    child = os.fork()
    if child == 0:
        import time
        time.sleep(600)
    print(child, flush=True)
    input()
os.kill(child, 9)
"""


def hold(output, kind: str) -> tuple[subprocess.Popen, int]:
    """A process that holds the claim, with a forked child, which must not inherit it."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    return holder, int(holder.stdout.readline())


@pytest.mark.long
@pytest.mark.parametrize("kind, lock", [("folder", "out/.lock"), ("file", "out.lock")])
def test_the_second_run_is_refused_and_told_of_the_first_until_that_is_gone_or_killed(tmp_path, kind, lock):
    output = tmp_path / "out"
    for ends_well in (True, False):
        holder, child = hold(output, kind)
        assert (tmp_path / lock).exists()
        first = rf"process {holder.pid} on {socket.gethostname()} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        with (
            pytest.raises(UserError, match=rf"out is being written by another run \({first}.*\); wait for it, or end"),
            lock_output(output, is_file=kind == "file"),
        ):
            pass
        if ends_well:
            holder.communicate(b"\n")
            assert not (tmp_path / lock).exists() and not output.exists(), "an empty folder is not left behind"
        else:
            holder.kill()
            holder.wait()
            with lock_output(output, is_file=kind == "file"):
                assert str(os.getpid()) in (tmp_path / lock).read_text()
            os.kill(child, signal.SIGKILL)
            holder.stdin.close(), holder.stdout.close()


def test_only_the_main_process_of_a_run_claims(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with lock_output(tmp_path / "out"):
        assert not (tmp_path / "out").exists()


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.json"
    write_text(path, "before")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write("half")
        file.flush()
        assert path.read_text() == "before"
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    write_bytes(path, b"after")
    assert path.read_text() == "after" and [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_the_files_of_a_folder_appear_whole_and_its_config_last(tmp_path, monkeypatch):
    folder, moved = tmp_path / "model", []
    replace = os.replace
    monkeypatch.setattr("os.replace", lambda new, path: (moved.append(path.name), replace(new, path)))
    with whole_files(folder) as new:
        for name in ("config.json", "model.safetensors", "a.json"):
            (new / name).write_text(name)
        assert [path.name for path in folder.iterdir()] == [new.name]
    assert moved == ["a.json", "model.safetensors", "config.json"]
    with pytest.raises(OSError), whole_files(folder) as new:
        (new / "a.json").write_text("half")
        raise OSError
    assert {path.name: path.read_text() for path in folder.iterdir()} == {name: name for name in moved}


def test_texts_are_read_as_utf_8_with_or_without_a_byte_order_mark(tmp_path):
    (tmp_path / "a").write_text("\ufeffé", encoding="utf-8")
    assert read_text(tmp_path / "a", "text") == "é"
    (tmp_path / "a").write_bytes(b"\xe9")
    with pytest.raises(UserError, match="expected UTF-8 text, found byte 0xe9"):
        read_text(tmp_path / "a", "text")
