"""The scripts of examples/ run as they stand, offline; the one for vLLM in scripts/test_vllm.sh's Python alone."""

import ast
import os
import runpy
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

import llm2

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_at_most_30_lines_and_says_how_to_run_it(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 30
    assert f"python examples/{path.name}" in ast.get_docstring(ast.parse(text))


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "name, arguments, printed",
    [
        ("decode", [], ["So the answer is 18."]),
        ("score", [], ["So the answer is"]),
        ("train", ["FOLDER/some.jsonl", "FOLDER/verifier"], ["held-out pairs in which gold is preferred: 8"]),
        ("own_task", ["FOLDER/out"], ["plain_greedy: ", "guided_greedy: "]),
        ("vllm_guided", [], ["plain: ", "guided: "]),
    ],
)
def test_an_example_runs(name, arguments, printed, tmp_path, monkeypatch, capfd):
    if name.startswith("vllm") and find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    lines = (ROOT / "dataset" / "testbed.jsonl").read_text().splitlines(True)
    (tmp_path / "some.jsonl").write_text("".join(lines[:400]))
    script, arguments = f"examples/{name}.py", [argument.replace("FOLDER", str(tmp_path)) for argument in arguments]
    if name == "decode":  # the others run in this process: most of their time would be the import of torch
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, script, *arguments], cwd=ROOT, env=environment, check=True)
    else:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        monkeypatch.syspath_prepend(ROOT / "examples")  # as Python does for a script
        monkeypatch.chdir(ROOT)
        runpy.run_path(script, run_name="__main__")
    output = capfd.readouterr().out
    assert all(part in output for part in printed), output


def test_every_example_is_run():
    (cases,) = [mark.args[1] for mark in test_an_example_runs.pytestmark if mark.name == "parametrize"]
    run = {name for name, _, _ in cases}
    assert {path.stem for path in EXAMPLES} == run


@pytest.mark.parametrize("name", llm2.PUBLIC)
def test_every_public_name_is_there_with_a_docstring(name):
    assert getattr(llm2, name).__doc__


def test_the_version_is_that_of_the_project():
    assert llm2.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
