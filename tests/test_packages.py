"""Imports between packages go one way, pure modules stay pure, and importing llm2 costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

LLM2 = Path(__file__).parent.parent / "llm2"
# Besides llm2.errors and llm2.config, which everything may import, and itself, a package imports from these only.
MAY_IMPORT = {
    "common": set(),
    "testbed": set(),
    "tasks": {"common", "testbed"},
    "verifier": {"common"},
    "decoding": {"common", "verifier"},
    "vllm": {"common", "verifier", "decoding"},
    "exploration": {"common", "tasks", "verifier", "decoding", "vllm"},
    "evaluation": {"common", "tasks", "verifier", "decoding", "vllm"},
}
# Values in, values out: no files, no models, no other module of llm2 but pure ones.
PURE = {
    "common.seeds",
    "common.stats",
    "decoding.candidates",
    "evaluation.metrics",
    "exploration.quality",
    "tasks.grading",
    "verifier.loss",
    "verifier.masks",
    "vllm.settings",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(LLM2).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    return module.split(".")[0]


def imports() -> dict[str, set[str]]:
    """Module of llm2 -> the modules of llm2 that it imports, wherever in the file."""
    imported = {}
    for path in LLM2.rglob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        names = {node.module for node in nodes} | {f"{node.module}.{a.name}" for node in nodes for a in node.names}
        files = {name for name in names if (LLM2.parent / name.replace(".", "/")).with_suffix(".py").exists()}
        packages = {n for n in names if n.startswith("llm2.") and (LLM2.parent / n.replace(".", "/")).is_dir()}
        imported[module_name(path)] = {n.removeprefix("llm2.") for n in files | packages if n.startswith("llm2.")}
    return imported


IMPORTS = imports()


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_from_those_below_it(package):
    allowed = MAY_IMPORT[package] | {package, "errors", "config"}
    for module, used in IMPORTS.items():
        if package_of(module) == package:
            assert {package_of(name) for name in used} <= allowed, module


def test_every_package_has_its_rule():
    folders = {path.parent.name for path in LLM2.glob("*/__init__.py")}
    assert folders == MAY_IMPORT.keys()


def test_the_package_imports_nothing_of_the_laboratory():
    outside = ("experiments", "benchmarks", "tests")
    for path in LLM2.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.split(".")[0] in outside], path


def test_no_module_imports_the_command_line():
    assert not any("__main__" in used for used in IMPORTS.values())


def test_pure_modules_import_pure_ones_only():
    for module in PURE:
        assert IMPORTS[module] <= PURE | {"errors", "config"}, module


def test_no_module_is_named_utils_helpers_or_misc():
    assert not [path for path in LLM2.rglob("*.py") if path.stem in ("utils", "helpers", "misc")]


def test_importing_the_package_and_the_command_line_does_not_import_torch():
    code = "import sys, llm2, llm2.config, llm2.__main__, llm2.tasks; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=LLM2.parent)
