"""The testbed's word problems as GSM8K records, in splits that share no question.

Uses the standard library only, seeded by the names of regime and split, so every machine gets the same problems. A
regime sets the style of gold solutions and the System 1 they are for (llm2/testbed/README.md); a question of a split is
in no other split of any regime.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from itertools import islice

from llm2.testbed.foreign import foreign_answer
from llm2.testbed.stories import VARIETIES, Step, Story, draw_story, value_of

# The hash of a question decides its split; SHARES are in twentieths of all questions.
SHARES = {"pretrain": 10, "train": 5, "validation": 1, "test": 4}
SIZES = {"pretrain": 200_000, "train": 8_000, "validation": 500, "test": 2_000}
CONCLUSION = "So the answer is {}."


def problems(split: str, n: int | None = None, regime: str = "same") -> list[dict]:
    """The first n problems of a regime's split (SIZES[split] when None), as {"id", "question", "answer"}.

    The answer has one step per line, each with an annotation such as `<<48/2=24>>`, and ends in `#### 24`.
    """
    answer = REGIMES[regime]
    return [
        {"id": f"{split}-{index}", "question": story.question, "answer": answer(story)}
        for index, story in enumerate(islice(stories(split, regime), SIZES[split] if n is None else n))
    ]


def stories(split: str, regime: str = "same") -> Iterator[Story]:
    """The endless, deterministic sequence of a split's stories; no question twice."""
    rng = random.Random(f"llm2 testbed {split}" if regime == "same" else f"llm2 testbed {regime} {split}")
    variety, seen = VARIETIES.get(regime, VARIETIES["usual"]), set()
    while True:
        story = draw_story(rng, variety)
        if story and split_of(story.question) == split and story.question not in seen:
            seen.add(story.question)
            yield story


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
    lines = [story.say(step, _annotate(step, story.values, value)) for step, value in _solve(story)]
    return "\n".join([*lines, final_answer(story)])


def final_answer(story: Story) -> str:
    """The answer alone, in GSM8K's format."""
    return f"#### {story.values[-1]}"


def gold_solution(story: Story) -> str:
    """The gold solution as an assistant's message: one paragraph without annotations, the answer at its end."""
    sentences = [story.say(step, equation(step, story.values, value)) for step, value in _solve(story)]
    return " ".join([*sentences, CONCLUSION.format(story.values[-1])])


def equation(step: Step, values: tuple[int, ...] | list[int], result: int) -> str:
    return f"{value_of(step.left, values)} {step.operator} {value_of(step.right, values)} = {result}"


def _annotate(step: Step, values: tuple[int, ...], result: int) -> str:
    plain = equation(step, values, result)
    calculation, _, _ = plain.rpartition(" ")
    return f"{calculation} <<{plain.replace(' ', '')}>>{result}"


def _solve(story: Story) -> Iterator[tuple[Step, int]]:
    return zip(story.steps, story.values, strict=True)


# Regime -> function that writes the answer of a story.
REGIMES: dict[str, Callable[[Story], str]] = {
    "same": worked_answer,
    "foreign": foreign_answer,
    "answers": final_answer,
    "careful": worked_answer,
    "two_skills": worked_answer,
    # Unlike System 1's training data
    "more_steps": worked_answer,
    "new_words": worked_answer,
    "large_numbers": worked_answer,
}
