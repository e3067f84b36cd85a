"""The long parts of experiments/torture at a tiny scale, and that each of them can fail."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from experiments.torture import __main__ as torture
from experiments.torture import determinism, exits, kills, soak

LEAK = """
import sys, time, tempfile
from pathlib import Path
journal = Path(sys.argv[1]); journal.mkdir(); kept = []
for number in range(60):
    if sys.argv[2] == "leak":
        kept += open(tempfile.mkstemp()[1]), bytearray(2**22)
    time.sleep(0.05)
journal.rmdir()
time.sleep(0.3)
"""


@pytest.mark.parametrize("kind", ["flat", "leak"])
def test_a_leak_shows_in_the_samples(kind, tmp_path, monkeypatch):
    journal, temporary = tmp_path / "journal", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    process = subprocess.Popen([sys.executable, "-c", LEAK, journal, kind])
    samples = soak.watch(psutil.Process(process.pid), temporary, journal, 0.1)
    assert process.wait() == 0 and samples[-1].done
    steady = [sample for sample in samples if not sample.done]
    assert len(steady) > 10
    for key in ("open_files", "temporary_files", "address_space_mib"):
        rise = soak.rise([s.seconds for s in steady], [getattr(s, key) for s in steady])
        assert (rise > 20) == (kind == "leak") and (abs(rise) < 1) == (kind == "flat"), key
    soak.save(soak.draw("a plot", samples, 1.0), tmp_path / "plot.svg")
    assert "temp. files" in (tmp_path / "plot.svg").read_text()


def test_times_and_folders_are_left_out_of_the_comparison_and_nothing_else(tmp_path):
    for name, seconds, value in (("a", 1, 5), ("b", 2, 5), ("c", 1, 6)):
        (tmp_path / name).mkdir()
        text = (
            f'{{"seconds": {seconds}, "rows": [{{"train_seconds": 3, "value": {value}}}], "at": "{tmp_path / name}"}}'
        )
        (tmp_path / name / "report.json").write_text(text)
    a, b, c = (determinism.contents(tmp_path / name) for name in "abc")
    assert a == b != c and a["report.json"] == b'{"rows": [{"value": 5}], "at": "FOLDER"}'


def test_the_page_is_written_once_every_part_is_done_at_full_scale(tmp_path, monkeypatch, capsys):
    results, page = tmp_path / "results", tmp_path / "page"
    monkeypatch.setattr(torture, "RESULTS", results)
    monkeypatch.setattr(torture, "PAGE", page)
    for name in torture.PARTS:
        write_result(results, name, 0.5 if name == "fuzz" else 1.0, failed=int(name == "exits"))
    (results / "soak" / "explore").mkdir(parents=True)
    (results / "soak" / "explore" / "explore.svg").write_text("<svg/>")
    assert torture.main(["soak"]) == 0 and torture.main(["exits"]) == 1
    assert "soak: done already; delete" in capsys.readouterr().out and not page.exists()
    write_result(results, "fuzz", 1.0)
    assert torture.main([]) == 1, "one has failed"
    text = (page / "README.md").read_text()
    assert "\n| fuzz | 1,000 | 0 |\n" in text and "\n| exits | 1,000 | 1 |\n" in text
    assert "| fuzz | a try | 1,000 | 0 | a \\| b |\n" in text and "| exits | a try | 1,000 | 1 | a \\| b |\n" in text
    assert "![Soak: explore](explore.svg)" in text and (page / "explore.svg").exists()


def write_result(results: Path, name: str, scale: float, failed: int = 0) -> None:
    results.mkdir(exist_ok=True)
    row = {"what": "a try", "tried": 1000, "failed": failed, "detail": "a | b"}
    (results / f"{name}.json").write_text(json.dumps({"scale": scale, "seconds": 1, "rows": [row]}))


@pytest.mark.slow
def test_runs_are_equal_to_the_byte(tmp_path):
    rows = determinism.run(tmp_path, 0.05, only=("an ASCII locale", "killed, then resumed"))
    assert [row.tried for row in rows] == [2] * 4 and not any(row.failed for row in rows), rows


@pytest.mark.slow
def test_a_disturbed_exploration_goes_on_to_the_files_of_an_undisturbed_one(tmp_path):
    rows = kills.run(tmp_path, 0.05, only=("explore",), processes=(1,))
    assert [(row.tried, row.failed) for row in rows] == [(1, 0)] * 4, rows


@pytest.mark.slow
def test_two_processes_end_with_status_0(tmp_path):
    rows = exits.run(tmp_path, 2 / exits.STARTS)
    assert [(row.tried, row.failed) for row in rows] == [(1, 0), (1, 0)], rows


@pytest.mark.slow
def test_a_short_evaluation_and_exploration_are_watched_from_begin_to_end(tmp_path, monkeypatch):
    """Too short to be flat: what is tested is that samples are taken and drawn."""
    monkeypatch.setattr(soak, "TOLERANCE", dict.fromkeys(soak.TOLERANCE, 10_000.0))
    rows = soak.run(tmp_path, 0.01, interval=0.2)
    assert [row.failed for row in rows] == [0, 0, 0], rows
    assert all(Path(tmp_path, name, f"{name}.svg").exists() for name in soak.PROBLEMS)
