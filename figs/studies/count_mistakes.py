"""What is still wrong: the greedy solutions of a study with a wrong answer, with and without a false equation.

python -m figs.studies.count_mistakes results/studies/regimes   # prints a table, writes figs/studies/mistakes.md
"""

import sys
from collections import defaultdict
from pathlib import Path

from llm2.common.files import write_text
from llm2.common.jsonl import read_jsonl
from llm2.testbed.mistakes import has_false_equation


def count(folder: Path) -> dict[tuple[str, str], list[tuple[int, int, int]]]:
    """(method, regime) -> for each seed problems, wrong answers, and those of them with a false equation."""
    counts = defaultdict(list)
    for path in sorted(folder.glob("*-[0-9]-*/greedy/predictions.jsonl")):
        method, _, regime = path.parts[-3].rsplit("-", 2)
        if regime == "sorting":
            continue  # lists, no equations
        samples = [line["samples"][0] for _, line in read_jsonl(path, "predictions")]
        wrong = [sample["text"] for sample in samples if not sample["correct"]]
        counts[method, regime].append((len(samples), len(wrong), sum(map(has_false_equation, wrong))))
    return counts


def table(counts: dict[tuple[str, str], list[tuple[int, int, int]]]) -> str:
    lines = [
        "| method | regime | seeds | wrong, % | with a false equation, % | without, % |",
        "|---|---|---|---|---|---|",
    ]
    for (method, regime), seeds in sorted(counts.items(), key=lambda item: item[0][::-1]):
        problems, wrong, false = (sum(column) for column in zip(*seeds, strict=True))
        shares = (wrong, false, wrong - false)
        cells = [method, regime, str(len(seeds)), *(f"{100 * share / problems:.1f}" for share in shares)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = table(count(Path(sys.argv[1])))
    write_text(Path(__file__).with_name("mistakes.md"), text)
    print(text)
