"""MAWPS's training problems as chats behind four worked ones, so that SmolLM2 as it is answers in a sentence or two.

    PYTHONPATH=. python experiments/results/worked_examples.py OUTPUT

The four are training problems themselves, one for each operation, and are left out. `task=chats` reads the file.
"""

import json
import sys

from llm2.tasks import load_task

EXAMPLES = ("train-0", "train-9", "train-20", "train-27")  # a difference, a sum, a product, a quotient of two steps


def main(output: str) -> None:
    task = load_task("mawps")
    problems = task.problems("train")
    history = [message for problem in problems if problem.id in EXAMPLES for message in task.conversation(problem)]
    with open(output, "w", encoding="utf-8") as file:
        for problem in problems:
            if problem.id not in EXAMPLES:
                messages = [*history, *task.conversation(problem)]
                file.write(json.dumps({"id": problem.id, "messages": messages, "answer": problem.gold}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
