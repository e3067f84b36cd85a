"""Imports go down the layers only, and importing the package costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "llm2"
# A module may import from the layers before its own, and pure modules from pure ones.
LAYERS = [
    {"errors", "seeds", "candidates", "branches", "loss", "statistics", "grading", "config", "chat", "cache", "graphs"},
    {
        *("triplets", "metrics", "models", "testbed", "journal", "attention", "trunks"),
        *("quality", "checkers", "processes"),
    },
    {"benchmarks"},
    {"lora", "packing", "checkpoints", "pairs", "golds", "predictions", "lines"},
    {"verifier", "batch"},
    {"readers", "scoring", "choosing"},
    {"flight"},
    {"generation", "trainer"},
    {"rollouts", "report", "model", "processor", "exploration_report", "tracing", "card"},
    {"exploration", "training", "evaluation", "harness", "pretraining"},
    {"sweep"},
    {"speed"},
    {"__main__"},
]
PURE = {"errors", "seeds", "candidates", "branches", "packing", "loss", "statistics", "grading", "metrics", "quality"}


def imports() -> dict[str, set[str]]:
    """First-level module of llm2 -> those it imports."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts == ("__init__",):
            continue
        names = found.setdefault(parts[0], set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llm2"):
                modules = [node.module] if node.module != "llm2" else [f"llm2.{a.name}" for a in node.names]
                names |= {module.split(".")[1] for module in modules}
    return found


def test_every_module_has_its_layer():
    assert set(imports()) == set().union(*LAYERS)


def test_imports_go_down():
    level = {module: depth for depth, layer in enumerate(LAYERS) for module in layer}
    for module, used in imports().items():
        for other in used - {module}:
            same_pure = module in PURE and other in PURE
            assert level[other] < level[module] or same_pure or other == "errors", f"{module} imports {other}"


def test_pure_modules_import_pure_ones_only():
    found = imports()
    for module in PURE:
        assert found[module] <= PURE, module


def test_importing_the_package_does_not_import_torch():
    code = "import sys, llm2, llm2.config, llm2.__main__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
