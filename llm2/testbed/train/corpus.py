"""The careless corpus that System 1 imitates, as a web-scale model imitates the web.

Knows how careless authors solve a story: in other words and other orders that are as good as gold, and with
misreadings, wrong operands, slips and skipped steps whose errors are carried through to the answer. The rates below are
the corpus's only settings. Leaves the stories to stories.py and the model that reads all this to pretraining.py.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

from llm2.testbed import facts
from llm2.testbed.generator import CONCLUSION, stories
from llm2.testbed.stories import Operand, Step, Story, Told, Worked, calculate, value_of


@dataclass(frozen=True)
class Misreading:
    """What a careless author makes of a wording, and how often. It shows at one token of the solution."""

    rate: float
    operator: str = ""  # another operation
    right: int | None = None  # another number on the right
    skip: Literal["", "left", "right"] = ""  # the step is left out, and this operand taken for its result


MAJORITY = 0.65  # more authors get these wordings wrong than right: System 1's greedy choice is wrong
MISREADINGS = {
    facts.HALF: Misreading(MAJORITY, operator="*"),
    facts.FEWER: Misreading(MAJORITY, operator="+"),
    facts.EACH_FRIEND: Misreading(MAJORITY, skip="right"),
    facts.ALL_BUT: Misreading(MAJORITY, skip="right"),
    facts.EVERY_OTHER_DAY: Misreading(MAJORITY, skip="left"),
    facts.DOZEN: Misreading(MAJORITY, right=10),
    facts.WEEKS: Misreading(0.2, right=5),
    facts.FRACTION: Misreading(0.15, operator="-"),
    facts.MORE: Misreading(0.1, operator="-"),
    facts.TIMES: Misreading(0.1, operator="+"),
    facts.BOXES_OF: Misreading(0.1, operator="+"),
}
WRONG_OPERAND = 0.01  # of steps: another number of the problem in place of the right one
SLIP = 0.01  # of steps: the result is off by one or by ten
SKIPPED = 0.005  # of steps but the last: left out
PARAPHRASED = 0.25  # of steps: said in other words, as good as gold
SWAPPED = 0.15  # of plain sums and products: operands the other way round, as good as gold
REORDERED = 0.25  # of solutions: independent steps in any valid order, as good as gold


class Solution(NamedTuple):
    text: str
    answer: int
    mishaps: tuple[str, ...]  # what went wrong, in order: a phrase misread, "operand", "slip" or "skipped"


def careless_conversations(n: int, seed: int = 0) -> Iterator[list[dict[str, str]]]:
    """The corpus: the pretrain split's first n problems, each as one author answered it."""
    rng = random.Random(f"llm2 testbed corpus {seed}")
    for story in islice(stories("pretrain"), n):
        yield [
            {"role": "user", "content": story.question},
            {"role": "assistant", "content": careless_solution(story, rng).text},
        ]


def careless_solution(story: Story, rng: random.Random) -> Solution:
    """One author's way through the story."""
    values = list(story.values)  # what the author holds each result to be
    told = sorted(
        {operand.value for step in story.steps for operand in (step.left, step.right) if type(operand) is Told}
    )
    sentences, mishaps = [], []
    for index in _order(story.steps, rng):
        step, mishap = _read(story.steps[index], rng, told)
        may_skip = index < len(story.steps) - 1
        misreading = MISREADINGS.get(mishap)
        if may_skip and misreading and misreading.skip:
            values[index] = value_of(getattr(step, misreading.skip), values)
        elif may_skip and not mishap and rng.random() < SKIPPED:
            values[index], mishap = value_of(step.left, values), "skipped"
        else:
            sentence, values[index], slipped = _work(story, step, values, rng)
            sentences.append(sentence)
            mishap = mishap or slipped
        mishaps += [mishap] if mishap else []
    return Solution(" ".join([*sentences, CONCLUSION.format(values[-1])]), values[-1], tuple(mishaps))


def _read(step: Step, rng: random.Random, told: list[int]) -> tuple[Step, str]:
    """The step as the author understands it, and what went wrong in understanding it."""
    misreading = MISREADINGS.get(step.phrase)
    if misreading and rng.random() < misreading.rate:
        right = step.right if misreading.right is None else Told(misreading.right)
        return step._replace(operator=misreading.operator or step.operator, right=right), step.phrase
    if rng.random() < WRONG_OPERAND:
        others = [value for value in told if Told(value) != step.right]
        if others:
            return step._replace(right=Told(rng.choice(others))), "operand"
    if step.operator in "+*" and not step.phrase and rng.random() < SWAPPED:
        return step._replace(left=step.right, right=step.left), ""
    return step, ""


def _work(story: Story, step: Step, values: list[int], rng: random.Random) -> tuple[str, int, str]:
    """The sentence an author writes for the step, the result in it, and "slip" if it is off."""
    left, right = value_of(step.left, values), value_of(step.right, values)
    if step.operator == "-" and left < right:
        left, right = right, left  # after an earlier error: a careless author takes the smaller from the larger
    result, slip = calculate(left, step.operator, right), ""
    if rng.random() < SLIP:
        result, slip = abs(result + rng.choice((-10, -1, 1, 10))), "slip"
    way = rng.randrange(1, len(step.sentences)) if rng.random() < PARAPHRASED else 0
    return story.say(step, f"{left} {step.operator} {right} = {result}", way), result, slip


def _order(steps: tuple[Step, ...], rng: random.Random) -> list[int]:
    """The steps' own order, or any other in which each comes after those it needs; the last stays the last."""
    if rng.random() >= REORDERED:
        return list(range(len(steps)))
    order, waiting = [], list(range(len(steps) - 1))
    while waiting:
        ready = [index for index in waiting if _needs(steps[index]) <= set(order)]
        order.append(rng.choice(ready))
        waiting.remove(order[-1])
    return [*order, len(steps) - 1]


def _needs(step: Step) -> set[int]:
    operands: tuple[Operand, Operand] = (step.left, step.right)
    return {operand.step for operand in operands if isinstance(operand, Worked)}
