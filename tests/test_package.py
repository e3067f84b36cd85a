"""Packaging: dependencies are declared, and a wheel works outside the checkout."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, metadata, packages_distributions
from pathlib import Path

import pytest
import yaml

from llm2.common.loading import NEWEST_TESTED

ROOT = Path(__file__).parent.parent
TOML = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, BUILD = TOML["project"], TOML["build-system"]["requires"]
RUNTIME = PROJECT["dependencies"]
OPTIONAL = PROJECT["optional-dependencies"]
CHECKOUT = ("experiments", "benchmarks", "tests", "figs")  # what is not in the wheel
EXTRAS = [each for extra in OPTIONAL.values() for each in extra]
NOT_IMPORTED = {
    "pytest-xdist": "pytest's -n",
    "ruff": "a command",
    "uv": "a command",
}
LICENCE_WORDS = {"PSF": "Python Software Foundation"}  # where a package's metadata has other words


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


def name(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-")


def specifier(requirement: str) -> str:
    return re.search(r"[^\w-].*", requirement)[0]


def names(requirements: list[str]) -> set[str]:
    return set(map(name, requirements))


def listed() -> dict[str, tuple[str, str]]:
    """requirements.txt: name -> version specifier and licence."""
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#"]
    parts = [line.partition("  # ") for line in lines]
    return {name(requirement): (specifier(requirement), licence) for requirement, _, licence in parts}


def imported_distributions(*folders: str) -> set[str]:
    """Distributions that are imported anywhere in these folders, except from vLLM and those that a script of the page
    of surprises says it needs beside ours."""
    modules = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module.split(".")[0])
    own = {path.stem for path in (ROOT / "tests").glob("*.py")} | {
        "llm2",
        "experiments",
        "benchmarks",
        "tests",
        "figs",
        "vllm",
        "torchao",
        "xllamacpp",
    }
    installed = packages_distributions()
    return {name(installed[module][0]) for module in modules - sys.stdlib_module_names - own}


def test_every_import_is_a_declared_dependency():
    assert imported_distributions("llm2") <= names(RUNTIME + EXTRAS) - names(OPTIONAL["test"])
    assert imported_distributions(*CHECKOUT) <= names(RUNTIME + EXTRAS)


def test_every_dependency_is_imported_somewhere():
    used = imported_distributions("llm2", *CHECKOUT) | {"vllm"}
    assert names(RUNTIME + EXTRAS) - used == set(NOT_IMPORTED)
    assert names(OPTIONAL["test"]) & imported_distributions("llm2") == set(), "the package needs no tool for tests"


def test_every_dependency_has_bounds_and_a_reason():
    text = (ROOT / "pyproject.toml").read_text()
    for requirement in RUNTIME + EXTRAS:
        assert re.fullmatch(r">=[\d.]+,<[\d.]+", specifier(requirement)), requirement
        assert re.search(rf'"{re.escape(requirement)}",  # \w', text), requirement


def test_requirements_txt_has_every_dependency_but_vllm_within_its_bounds():
    expected = {name(each): specifier(each) for each in [*RUNTIME, *EXTRAS, *BUILD] if name(each) != "vllm"}
    found = {each: bounds for each, (bounds, _) in listed().items()}
    assert found.pop("torch").startswith("==") and expected.pop("torch")
    assert found == expected


def locked() -> dict[str, set[str]]:
    """requirements.lock: name -> its versions, one for each Python."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line[0] != "#":
            package, _, version = line.split(" ;")[0].partition("==")
            found.setdefault(name(package), set()).add(version)
    return found


def test_the_lock_has_an_exact_version_of_every_requirement():
    lock = locked()
    assert names([*listed()]) <= lock.keys() and all(re.fullmatch(r"[\w.]+", v) for each in lock.values() for v in each)
    assert lock["transformers"] == {NEWEST_TESTED}
    table = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \|", (ROOT / "tests" / "README.md").read_text(), re.M)
    lowest = {name(each): specifier(each).split(",")[0].removeprefix(">=") for each in RUNTIME + EXTRAS}
    assert len(table) == 12
    for package, in_lock, in_lowest in table:
        assert in_lock in lock[name(package)], package
        assert in_lowest.startswith(lowest[name(package)]), package


@pytest.mark.parametrize("package", sorted(listed()))
def test_the_listed_licence_is_the_packages_own(package):
    about = metadata(package)
    stated = [about["License-Expression"], about["License"], *(about.get_all("Classifier") or [])]
    stated += [path.read_text() for path in distribution(package).files if "LICENSE" in path.name.upper()]
    family = re.match(r"[A-Z]+|Apache", listed()[package][1])[0]
    assert LICENCE_WORDS.get(family, family) in " ".join(filter(None, stated))


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


def test_findings_are_executable():
    scripts = [*(ROOT / "findings").glob("*.sh")]
    assert scripts and not [path.name for path in scripts if not path.stat().st_mode & 0o100]
