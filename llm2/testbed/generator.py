"""The testbed's word problems as GSM8K records, in splits that share no question.

Uses the standard library only, seeded by the names of regime and split, so every machine gets the same problems. A
question of a split is in no other split of any regime.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from llm2.testbed.stories import Step, Story, Variety, draw_story, value_of

# The hash of a question decides its split; SHARES are in twentieths of all questions.
SHARES = {"pretrain": 10, "train": 5, "validation": 1, "test": 4}
SIZES = {"pretrain": 200_000, "train": 8_000, "validation": 500, "test": 2_000}


def split_of(question: str) -> str:
    """The only split that may contain a question."""
    bucket = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") % sum(SHARES.values())
    for split, share in SHARES.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("the shares cover every bucket")


def worked_answer(story: Story) -> str:
    """The gold solution in GSM8K's format."""
    solved = zip(story.steps, story.values, strict=True)
    lines = [story.say(step, _annotate(step, story.values, value)) for step, value in solved]
    return "\n".join([*lines, f"#### {story.values[-1]}"])


def _annotate(step: Step, values: tuple[int, ...], result: int) -> str:
    calculation = f"{value_of(step.left, values)} {step.operator} {value_of(step.right, values)}"
    return f"{calculation} = <<{calculation.replace(' ', '')}={result}>>{result}"


class Regime(NamedTuple):
    """Which stories are drawn, and what their gold solutions are like; experiments/testbed has further regimes."""

    name: str
    answer: Callable[[Story], str] = worked_answer
    variety: Variety = Variety()


SAME = Regime("")  # solutions in System 1's own style


def problems(split: str, n: int | None = None, regime: Regime = SAME) -> list[dict]:
    """The first n problems of a regime's split (SIZES[split] when None), as {"id", "question", "answer"}.

    The answer has one step per line, each with an annotation such as `<<48/2=24>>`, and ends in `#### 24`.
    """
    return [
        {"id": f"{split}-{index}", "question": story.question, "answer": regime.answer(story)}
        for index, story in enumerate(islice(stories(split, regime), SIZES[split] if n is None else n))
    ]


def stories(split: str, regime: Regime = SAME) -> Iterator[Story]:
    """The endless, deterministic sequence of a split's stories; no question twice."""
    rng, seen = random.Random(" ".join(filter(None, ("llm2 testbed", regime.name, split)))), set()
    while True:
        story = draw_story(rng, regime.variety)
        if story and split_of(story.question) == split and story.question not in seen:
            seen.add(story.question)
            yield story
