"""Draw figs/imports.svg, which package of llm2 imports which: python -m figs.draw_imports

An arrow points from a package to one that it imports, the thicker the more imports there are between their modules.
Left out: __main__, which imports every command, and common, config and errors, which every package may import.
"""

import ast
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent / "llm2"
POSITIONS = {  # column and row of each package; imports go down
    "exploration": (1.2, 3.7),
    "evaluation": (3.2, 3.8),
    "vllm": (2.2, 3.0),
    "decoding": (2.0, 2.0),
    "verifier": (2.0, 1.0),
    "tasks": (3.6, 1.5),
    "testbed": (3.6, 0.7),
    "common": (0.5, 0.7),
}


def edges() -> Counter[tuple[str, str]]:
    """(importing package, imported package) -> imports between their modules."""
    counts = Counter()
    for path in ROOT.rglob("*.py"):
        package = path.relative_to(ROOT).parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("llm2."):
                counts[package, node.module.split(".")[1]] += 1
    return Counter(
        {(a, b): n for (a, b), n in counts.items() if a != b and a in POSITIONS and b in POSITIONS and b != "common"}
    )


def modules(package: str) -> int:
    return sum(file.name != "__init__.py" for file in (ROOT / package).rglob("*.py"))


def draw() -> plt.Figure:
    figure, axes = plt.subplots(figsize=(8, 7))
    for (a, b), count in edges().items():
        (x1, y1), (x2, y2) = POSITIONS[a], POSITIONS[b]
        style = {
            "arrowstyle": "-|>",
            "color": "#8a94a6",
            "lw": 0.6 + 0.12 * count,
            "shrinkA": 20,
            "shrinkB": 28,
            "zorder": 0,
        }
        axes.annotate("", (x2, y2), (x1, y1), arrowprops=style)
    for name, (x, y) in POSITIONS.items():
        label = f"{name}\n{modules(name)} module{'s' if modules(name) > 1 else ''}"
        box = {"boxstyle": "round,pad=0.5", "fc": "#eef3fb", "ec": "#34507d"}
        axes.text(x, y, label, ha="center", va="center", fontsize=10, bbox=box)
    axes.text(0.5, 0.25, "imported by all", ha="center", fontsize=8, color="#5b6472")
    axes.set(xlim=(0.1, 4.1), ylim=(0.1, 5.6))
    axes.axis("off")
    return figure


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "llm2"
    draw().savefig(Path(__file__).parent / "imports.svg", bbox_inches="tight", metadata={"Date": None})
