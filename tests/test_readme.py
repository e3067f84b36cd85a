"""What the README says is there, is there."""

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = {path: path.read_text() for path in (ROOT / "README.md", ROOT / "dataset" / "README.md")}


def test_no_placeholder_is_left():
    for path, text in DOCUMENTS.items():
        assert not re.findall(r"@[A-Z_]+@", text), path


@pytest.mark.parametrize(
    "path", sorted({p for t in DOCUMENTS.values() for p in re.findall(r"(?:configs|scripts)/[\w./-]+\.(?:sh|yaml)", t)})
)
def test_named_scripts_and_configs_exist(path):
    assert (ROOT / path).is_file()


def test_links_lead_to_files():
    for path, text in DOCUMENTS.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_the_file_tree_names_every_module_and_script():
    tree = README.split("## The files")[1].split("```")[1]
    for path in [*ROOT.glob("llm2/*.py"), *ROOT.glob("scripts/*.sh")]:
        if path.name != "__init__.py":
            assert f"  {path.name} " in tree, path.name
    for name in re.findall(r"^  (\w+\.(?:py|sh)) ", tree, re.MULTILINE):
        assert list(ROOT.glob(f"*/{name}")), name


@pytest.mark.parametrize("script", sorted(ROOT.glob("scripts/*.sh")), ids=lambda path: path.name)
def test_scripts_are_strict_and_parse(script):
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ") and "set -euo pipefail" in text
    subprocess.run(["bash", "-n", script], check=True)


def test_the_explained_record_is_in_the_file():
    block = re.search(r"```json\n(.*?)```", DOCUMENTS[ROOT / "dataset" / "README.md"], re.DOTALL).group(1)
    with open(ROOT / "dataset" / "testbed.jsonl") as file:
        assert json.loads(block) in map(json.loads, file)
