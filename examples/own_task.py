"""Evaluate on problems of your own: python examples/own_task.py

A task is a class with `problems` and `extract_answer`; commands take it as task=MODULE:CLASS.
"""

import re
import sys

from llm2 import EvaluateConfig, Problem, Task, evaluate


class Sums(Task):
    """How many are a, and b more than a, together?"""

    def problems(self, split, limit=None):
        pairs = [(a, b) for a in range(11, 18) for b in range(3, 10)][:limit]
        question = "Nina has {} shells. Ben has {} more shells than Nina. How many shells do they have together?"
        return [Problem(f"{split}-{a}-{b}", question.format(a, b), gold=str(a + a + b)) for a, b in pairs]

    def extract_answer(self, text):
        numbers = re.findall(r"\d+", text)
        return numbers[-1] if numbers else None


if __name__ == "__main__":
    folder = sys.argv[1] if sys.argv[1:] else "results/examples/sums"
    config = EvaluateConfig(model="testbed", task="own_task:Sums", limit=20, max_new_tokens=100, output_dir=folder,
                            verifier="testbed-verifier", beta=None, device="cpu")  # fmt: skip
    for mode, result in evaluate(config)["modes"].items():
        print(f"{mode}: {result['accuracy']:.0%} of {config.limit}")
