"""Files, links and examples in the READMEs exist and run."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.configs import BENCHMARKS
from experiments.commands import CONFIGS
from experiments.study.config import StudyConfig
from experiments.study.run import choose_values
from llm2.common.config_file import load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PACKAGES = sorted(
    p.parent for pattern in ("llm2/*", "experiments/*", "benchmarks") for p in ROOT.glob(f"{pattern}/__init__.py")
)
DOCUMENTS = {
    path: path.read_text()
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("*/README.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("llm2/*/README.md"),
        *ROOT.glob("experiments/**/README.md"),
    ]
}


@pytest.mark.parametrize(
    "path", sorted({p for t in DOCUMENTS.values() for p in re.findall(r"(?:configs|scripts)/[\w./-]+\.(?:sh|yaml)", t)})
)
def test_named_scripts_and_configs_exist(path):
    assert (ROOT / path).is_file()


def test_commands_use_existing_keys():
    """In READMEs, script headers and YAML comments; lm_eval.sh takes other arguments, `--only` axes of a study."""
    keys = {key for cls in (*CONFIGS.values(), *BENCHMARKS.values()) for key in cls.__dataclass_fields__} | {"key"}
    others = [*ROOT.glob("scripts/*.sh"), *ROOT.glob("configs/*/*.yaml"), *ROOT.glob("experiments/studies/*.yaml")]
    for path, text in (DOCUMENTS | {path: path.read_text() for path in others}).items():
        for command in re.findall(
            r"(?:bash scripts/(?!lm_eval)|(?:python -m (?:experiments|benchmarks)|\bllm2) [a-z])[^`\n]*", text
        ):
            only = re.findall(r"--only ([a-z]\w*=[\w.]+)", command)
            if only:
                study = re.search(r"study\.sh (\w+)", command)[1]
                assert choose_values(load_config(StudyConfig, ROOT / "experiments" / "studies" / f"{study}.yaml"), only)
            found = re.findall(r"\s\[?([a-z]\w*)=", re.sub(r"--only \S+", "", command))
            assert set(found) <= keys, f"{path}: {command}"


def test_links_lead_to_files():
    for path, text in DOCUMENTS.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_accuracies_with_intervals_are_those_of_committed_results():
    """In the README and on the pages of results: 53.5 [51.3, 55.7] stands in a study's JSON, or in the metrics of a
    single run, and a difference, -1.5 points [-2.5, -0.5], in a study's."""
    committed, differences = set(), set()
    for path in ROOT.glob("experiments/results/*.json"):
        study = json.loads(path.read_text())
        for row in study["rows"] + study.get("unseen", []):
            committed |= {interval(test["mean"], test["ci95"]) for test in row["accuracy"].values()}
            differences |= {interval(test["mean"], test["ci95"], "+") for test in row["against_baseline"].values()}
        for pair in study["comparisons"]:
            differences |= {interval(test["mean"], test["ci95"], "+") for test in pair["differences"].values()}
    for path in (*ROOT.glob("figs/quickstart/*.json"), *ROOT.glob("experiments/results/single/*.json")):
        for mode in json.loads(path.read_text())["modes"].values():
            committed.add(interval(mode["accuracy"], mode["ci95"]))
            votes = mode.get("majority_at", {})
            committed |= {interval(share, mode["majority_ci95"][k]) for k, share in votes.items()}
    for path in (ROOT / "README.md", *ROOT.glob("experiments/results/**/README.md")):
        found = set(re.findall(r"\d+\.\d \[\d+\.\d, \d+\.\d\]", path.read_text()))
        assert found and found <= committed, f"{path}: {sorted(found - committed)}"
        text = " ".join(path.read_text().split()).replace(" points [", " [")
        found = set(re.findall(r"[+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\]", text))
        assert found <= differences, f"{path}: {sorted(found - differences)}"
        assert found or path.parent.name != "results", "the page of studies has differences"


def test_the_figures_of_the_long_tests_are_those_of_their_table():
    rows = re.findall(
        r"^\| (\w+) \| (.+?) \| ([\d,]+) \| ([\d,]+) \|", (ROOT / "figs" / "torture" / "README.md").read_text(), re.M
    )

    def count(part: str, what: str = "", column: int = 2) -> int:
        return sum(int(row[column].replace(",", "")) for row in rows if row[0] == part and row[1].startswith(what))

    varied, differing = count("determinism"), count("determinism", column=3)
    text = " ".join(README.split())
    for words in (
        f"Killed {count('kills', 'kills:')} times",
        f"out of disk {count('kills', 'no room')} times",
        f"started twice on one folder {count('kills', 'two runs')} times",
        f"{count('bad_input', 'bad input')} bad inputs are refused",
        f"none of {count('fuzz'):,} fuzzed inputs",
        f"{count('exits')} of {count('exits')} pairs of processes",
        f"{count('soak', 'soak: guided'):,} problems in one go",
        f"in {varied - differing} of {varied} variations",
    ):
        assert words in text, words
    assert not any(count(part, column=3) for part in ("kills", "bad_input", "fuzz", "exits", "soak"))


def interval(mean: float, ci95: list[float], sign: str = "") -> str:
    mean, low, high = (format(100 * share, f"{sign}.1f") for share in (mean, *ci95))
    return f"{mean} [{low}, {high}]"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_every_package_has_a_readme_that_names_each_of_its_files(package):
    text = (package / "README.md").read_text()
    assert str(package.relative_to(ROOT)) in README
    for module in package.rglob("*.py"):
        assert module.name == "__init__.py" or module.name in text, module


def test_the_python_example_runs(capsys):
    names = {}
    exec(README.split("```python\n")[1].split("```")[0], names)
    assert capsys.readouterr().out.endswith("So the answer is 18.\n")
    assert len(names["sequences"]) == 3


@pytest.mark.parametrize("script", sorted(ROOT.glob("scripts/*.sh")), ids=lambda path: path.name)
def test_scripts_are_strict_and_parse(script):
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ") and "set -euo pipefail" in text
    subprocess.run(["bash", "-n", script], check=True)


def test_the_record_explained_in_the_dataset_readme_is_in_the_file():
    block = re.search(r"```json\n(.*?)```", DOCUMENTS[ROOT / "dataset" / "README.md"], re.DOTALL).group(1)
    with open(ROOT / "dataset" / "testbed.jsonl") as file:
        assert json.loads(block) in map(json.loads, file)
