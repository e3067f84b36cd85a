"""Packaging: dependencies are declared, and a wheel works outside the checkout."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = PROJECT["dependencies"]
EXTRAS = [each for extra in PROJECT["optional-dependencies"].values() for each in extra]


WITHOUT_EXTRAS = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        extras = ("matplotlib", "tensorboard", "deepspeed", "lm_eval", "math_verify", "pebble", "psutil", "trl")
        return None if name.partition(".")[0] in extras else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", each)[0].lower().replace("_", "-") for each in requirements}


def imported_distributions() -> set[str]:
    """Distributions that llm2 imports anywhere, except from vLLM."""
    modules = set()
    for path in (ROOT / "llm2").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module.split(".")[0])
    modules -= sys.stdlib_module_names | {"llm2", "vllm"}
    installed = packages_distributions()
    return {installed[module][0].lower().replace("_", "-") for module in modules}


def test_every_import_is_a_declared_dependency():
    assert imported_distributions() - names(RUNTIME + EXTRAS) <= {"markupsafe"}  # jinja2's own


def test_requirements_txt_installs_every_dependency_and_extra_but_vllm():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert names(RUNTIME + EXTRAS) - {"vllm"} <= names(lines)


def test_the_citation_is_the_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["preferred-citation"]["doi"] == "10.18653/v1/2025.naacl-short.15"
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"] == "MIT"


@pytest.mark.slow
def test_a_wheel_explores_trains_and_evaluates_in_an_empty_folder(tmp_path):
    """The runtime's dependencies come from this environment, without the extras'; llm2 only from the wheel."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = tmp_path / "source"  # setuptools builds in place
    shutil.copytree(ROOT / "llm2", source / "llm2", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [*pip, "wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("llm2-*.whl")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    install = [*pip, "--python", str(venv), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "without_extras.py").write_text(WITHOUT_EXTRAS)
    (site / "dependencies.pth").write_text(f"import without_extras\n{Path(yaml.__file__).parents[1]}\n")
    empty = tmp_path / "empty"
    empty.mkdir()

    def llm2(*arguments: str) -> str:
        command = [str(venv / "bin" / "llm2"), *arguments, "model=testbed", "device=cpu"]
        finished = subprocess.run(command, cwd=empty, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    task = ["task=testbed", "max_new_tokens=120", "batch_size=64"]
    llm2("explore", *task, "output=triplets.jsonl", "limit=20")
    sizes = ["global_batch_size=4", "per_device_train_batch_size=4", "num_train_epochs=1.0", "evaluations=1"]
    llm2("train", "train_file=triplets.jsonl", "output_dir=verifier", "eval_share=0.2", *sizes)
    printed = llm2("evaluate", *task, "verifier=verifier", "output_dir=results", "limit=8")
    assert "testbed, test split, n = 8" in printed and "pip install 'llm2[report]'" in printed
