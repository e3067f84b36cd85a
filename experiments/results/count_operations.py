"""Which operations System 1's own right solutions hold, beside those of all the problems that it sampled.

    PYTHONPATH=. python experiments/results/count_operations.py PAIRS [TASK=mawps] [SPLIT=train] [LIMIT=900]

PAIRS is an exploration's OUTPUT.pairs.jsonl. The operations of the first equation, in their order; shares in %.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from llm2.tasks import load_task


def operations(solution: str) -> str:
    """`35 - 12 + 3 = 26.` -> `-+`"""
    return "".join(re.findall(r"(?<=[\d ).])[-+*/](?= )", solution.partition(" = ")[0])) or "none"


def shares(solutions: Iterable[str]) -> tuple[int, dict[str, float]]:
    counts = Counter(map(operations, solutions))
    total = counts.total()
    return total, {name: round(100 * count / total, 1) for name, count in counts.most_common(8)}


def main(pairs: str, task: str = "mawps", split: str = "train", limit: str = "900") -> None:
    own = [json.loads(line)["messages"][-1]["content"] for line in Path(pairs).read_text(encoding="utf-8").splitlines()]
    print("all problems", *shares(problem.solution for problem in load_task(task).problems(split, int(limit))))
    print("own solutions", *shares(own))


if __name__ == "__main__":
    main(*sys.argv[1:])
