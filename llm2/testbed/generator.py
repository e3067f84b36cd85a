"""The testbed's word problems as GSM8K records, in splits that never share a problem.

Knows the record format, the splits and their sizes. Leaves what a problem says to stories.py and facts.py. Standard
library only: the same problems everywhere.
"""

import hashlib
import random
from collections.abc import Iterator
from itertools import islice

from llm2.testbed.stories import Step, Story, draw_story, value_of

# A problem's split is decided by the hash of its question: so many twentieths of all questions belong to each.
SHARES = {"pretrain": 10, "train": 5, "validation": 1, "test": 4}
SIZES = {"pretrain": 200_000, "train": 8_000, "validation": 500, "test": 2_000}
CONCLUSION = "So the answer is {}."


def problems(split: str, n: int | None = None) -> list[dict]:
    """The first n problems of a split, as {"id", "question", "answer"}; the split's own size when n is None.

    The answer holds a worked step a line, each with a `<<48/2=24>>` annotation, and `#### 24` at its end.
    """
    drawn = islice(stories(split), SIZES[split] if n is None else n)
    return [
        {"id": f"{split}-{index}", "question": story.question, "answer": worked_answer(story)}
        for index, story in enumerate(drawn)
    ]


def stories(split: str) -> Iterator[Story]:
    """The endless, always same sequence of a split's stories, each question once."""
    rng = random.Random(f"llm2 testbed {split}")
    seen = set()
    while True:
        story = draw_story(rng)
        if story and split_of(story.question) == split and story.question not in seen:
            seen.add(story.question)
            yield story


def split_of(question: str) -> str:
    """The one split that a question may be in."""
    bucket = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") % sum(SHARES.values())
    for split, share in SHARES.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("the shares cover every bucket")


def worked_answer(story: Story) -> str:
    """The gold solution as GSM8K writes it."""
    lines = [story.say(step, _annotated(step, story.values, value)) for step, value in _solved(story)]
    return "\n".join([*lines, f"#### {story.values[-1]}"])


def gold_solution(story: Story) -> str:
    """The gold solution as an assistant says it: no annotations, one paragraph, the answer at its end."""
    sentences = [story.say(step, equation(step, story.values, value)) for step, value in _solved(story)]
    return " ".join([*sentences, CONCLUSION.format(story.values[-1])])


def equation(step: Step, values: tuple[int, ...] | list[int], result: int) -> str:
    return f"{value_of(step.left, values)} {step.operator} {value_of(step.right, values)} = {result}"


def _annotated(step: Step, values: tuple[int, ...], result: int) -> str:
    plain = equation(step, values, result)
    calculation, _, _ = plain.rpartition(" ")
    return f"{calculation} <<{plain.replace(' ', '')}>>{result}"


def _solved(story: Story) -> Iterator[tuple[Step, int]]:
    return zip(story.steps, story.values, strict=True)
