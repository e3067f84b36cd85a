"""Problems as chats behind four worked ones of MAWPS, so that SmolLM2 as it is answers in a sentence or two.

    PYTHONPATH=. python experiments/results/worked_examples.py OUTPUT [TASK=mawps] [SPLIT=train]

The four are training problems, one for each operation, and are left out. `task=chats` reads the file.
"""

import json
import sys

from llm2.tasks import load_task

EXAMPLES = ("train-0", "train-9", "train-20", "train-27")  # a difference, a sum, a product, a quotient of two steps


def main(output: str, name: str = "mawps", split: str = "train") -> None:
    mawps, task = load_task("mawps"), load_task(name)
    worked = [problem for problem in mawps.problems("train") if problem.id in EXAMPLES]
    history = [message for problem in worked for message in mawps.conversation(problem)]
    with open(output, "w", encoding="utf-8") as file:
        for problem in task.problems(split):
            if problem not in worked:
                messages = [*history, *task.conversation(problem)]
                file.write(json.dumps({"id": problem.id, "messages": messages, "answer": problem.gold}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
