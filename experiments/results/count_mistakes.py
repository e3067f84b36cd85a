"""What is still wrong: the greedy solutions of a study with a wrong answer, with and without a false equation.

python -m experiments.results.count_mistakes regimes   # prints a table, writes experiments/results/regimes_mistakes.md
"""

import sys
from collections import defaultdict

from experiments.study.config import StudyConfig
from experiments.study.run import runs, step_folders, wanted_steps
from experiments.testbed.mistakes import has_false_equation
from llm2.common.config_file import load_config
from llm2.common.files import write_text
from llm2.common.jsonl import read_jsonl


def count(config: StudyConfig) -> dict[tuple[str, ...], list[tuple[int, int, int]]]:
    """Values of the axes -> for each seed problems, wrong answers, and those of them with a false equation."""
    counts = defaultdict(list)
    for one in runs(config):
        values = tuple(value for axis, value in one.values.items() if axis != config.over)
        if "sorting" in values:
            continue  # lists, no equations
        for folder in step_folders(config, one, wanted_steps(config, one)).values():
            if not (path := folder / "predictions.jsonl").exists():
                continue
            samples = [line["samples"][0] for _, line in read_jsonl(path, "predictions") if "greedy" in line["mode"]]
            wrong = [sample["text"] for sample in samples if not sample["correct"]]
            counts[values].append((len(samples), len(wrong), sum(map(has_false_equation, wrong))))
    return counts


def table(config: StudyConfig, counts: dict[tuple[str, ...], list[tuple[int, int, int]]]) -> str:
    axes = [axis for axis in config.axes if axis != config.over]
    headings = [*axes, "seeds", "wrong, %", "with a false equation, %", "without, %"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for values, seeds in counts.items():
        problems, wrong, false = (sum(column) for column in zip(*seeds, strict=True))
        shares = (wrong, false, wrong - false)
        cells = [*values, str(len(seeds)), *(f"{100 * share / problems:.1f}" for share in shares)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    config = load_config(StudyConfig, f"experiments/studies/{sys.argv[1]}.yaml")
    text = table(config, count(config))
    write_text(f"{config.report}_mistakes.md", text)
    print(text)
