"""A second skill for System 1, unrelated to word problems: lists of numbers to sort."""

import random
from collections.abc import Iterator
from itertools import islice

from llm2.testbed.generator import SIZES, split_of

TEMPLATES = ("Sort these numbers: {}.", "Put the numbers {} in order, the smallest first.")
LENGTHS = range(3, 7)
LARGEST = 99


def sorting_problems(split: str, n: int | None = None) -> list[dict]:
    """The first n lists of a split (SIZES[split] when None), as {"id", "question", "answer"}, such as "4, 17, 90"."""
    return [
        {"id": f"{split}-{index}", "question": question, "answer": answer}
        for index, (question, answer) in enumerate(islice(_lists(split), SIZES[split] if n is None else n))
    ]


def sorted_text(answer: str) -> str:
    """The answer as an assistant's message."""
    return f"In order they are {answer}."


def _lists(split: str) -> Iterator[tuple[str, str]]:
    """The endless, deterministic sequence of a split's (question, answer); no question twice."""
    rng, seen = random.Random(f"llm2 testbed sorting {split}"), set()
    while True:
        numbers = rng.sample(range(1, LARGEST + 1), rng.choice(LENGTHS))
        question = rng.choice(TEMPLATES).format(_join(numbers))
        if split_of(question) == split and question not in seen:
            seen.add(question)
            yield question, _join(sorted(numbers))


def _join(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
