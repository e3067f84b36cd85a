"""What the answers of smollm2-words have in common: its first equation beside the gold one.

python experiments/results/count_equations.py TASK SPLIT RESULTS_FOLDER
"""

import ast
import json
import re
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

from llm2.decoding.arithmetic import value_of
from llm2.tasks import load_task


def kind(text: str, correct: bool, gold: str) -> str:
    """gold: the equation's left side."""
    if correct:
        return "right"
    found = re.match(r"(.+?) = (-?[\d.,]*\d)", text)
    if found is None:
        return "no equation"
    left = found[1].replace(",", "")
    numbers, operations = ([sorted(re.findall(p, side)) for side in (left, gold)] for p in (r"[\d.]+", r"[-+*/]"))
    if left == gold:
        return "gold's equation, wrong arithmetic"
    try:
        holds = abs(value_of(ast.parse(left, mode="eval").body) - Fraction(found[2].replace(",", ""))) < 0.01
    except (ValueError, KeyError, ZeroDivisionError, SyntaxError):
        holds = False
    which = "gold's numbers" if numbers[0] == numbers[1] else "other numbers"
    which += ", gold's operations" if operations[0] == operations[1] else ", other operations"
    return which + ("" if holds else ", wrong arithmetic")


def main(task: str, split: str, folder: str) -> None:
    gold = {problem.id: problem.solution.split(" = ")[0] for problem in load_task(task).problems(split)}
    counts: dict[str, Counter] = {}
    for line in Path(folder, "predictions.jsonl").read_text().splitlines():
        record = json.loads(line)
        sample = record["samples"][0]
        mode = counts.setdefault(record["mode"], Counter())
        mode[kind(sample["text"], sample["correct"], gold[record["id"]])] += 1
    for mode, counter in counts.items():
        print(mode, *(f"{number:6} {name}" for name, number in counter.most_common()), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
