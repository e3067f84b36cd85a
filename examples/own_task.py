"""Evaluate on problems of your own: python examples/own_task.py

A task is a class with `problems` and `extract_answer`; commands take it as task=MODULE:CLASS.
"""

import sys

from llm2 import EvaluateConfig, Problem, Task, evaluate


class Sums(Task):
    """How many are a and b together?"""

    def problems(self, split, limit=None):
        pairs = [(a, b) for a in range(2, 9) for b in range(2, 9)][:limit]
        question = "Ann has {} apples. Ben has {} apples. How many apples do Ann and Ben have together?"
        return [Problem(f"{split}-{a}-{b}", question.format(a, b), gold=str(a + b)) for a, b in pairs]

    def extract_answer(self, text):
        numbers = [word.strip(".") for word in text.split() if word.strip(".").isdigit()]
        return numbers[-1] if numbers else None


if __name__ == "__main__":
    config = EvaluateConfig(
        model="testbed",
        verifier="testbed-verifier",
        beta=None,
        task="own_task:Sums",
        limit=20,
        max_new_tokens=100,
        device="cpu",
        output_dir=sys.argv[1] if sys.argv[1:] else "results/examples/sums",
    )
    for mode, result in evaluate(config)["modes"].items():
        print(f"{mode}: {result['accuracy']:.0%} of {config.limit}")
