"""The corpus that System 1 is trained on: word problems solved by careless authors.

Solutions vary in wording and order, as good as gold, and contain misreadings, wrong operands, slips and skipped steps,
whose consequences carry through to the answer. The rates below are the corpus's only settings.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

from experiments.testbed.regimes import sorted_text, sorting_problems, valid_order
from llm2.testbed.generator import stories
from llm2.testbed.stories import Given, Step, Story, calculate, value_of


@dataclass(frozen=True)
class Misreading:
    """How a wording is misread, and how often. The error shows at a single token of the solution."""

    rate: float
    operator: str = ""  # replaces the operator
    right: int | None = None  # replaces the right operand
    skip: Literal["", "left", "right"] = ""  # the step is omitted, and this operand is taken for its result


MAJORITY = 0.65  # most authors misread these wordings, so that System 1's greedy choice is wrong
MISREADINGS = {  # by the phrase of a fact
    "half as many": Misreading(MAJORITY, operator="*"),
    "fewer": Misreading(MAJORITY, operator="+"),
    "each friend": Misreading(MAJORITY, skip="right"),
    "all but": Misreading(MAJORITY, skip="right"),
    "every other day": Misreading(MAJORITY, skip="left"),
    "dozen": Misreading(MAJORITY, right=10),
    "weeks": Misreading(0.2, right=5),
    "fraction": Misreading(0.15, operator="-"),
    "more": Misreading(0.1, operator="-"),
    "times": Misreading(0.1, operator="+"),
    "boxes of": Misreading(0.1, operator="+"),
}
WRONG_OPERAND = 0.01  # of steps: another number of the problem as right operand
SLIP = 0.01  # of steps: the result is off by one or by ten
SKIPPED = 0.005  # of steps but the last: omitted
PARAPHRASED = 0.25  # of steps: another wording, as good as gold
SWAPPED = 0.15  # of plain sums and products: operands swapped, as good as gold
REORDERED = 0.25  # of solutions: independent steps in another valid order, as good as gold


class Solution(NamedTuple):
    """A careless solution of the corpus."""

    text: str
    answer: int
    errors: tuple[str, ...]  # in order: a misread phrase, "operand", "slip" or "skipped"


def careless_conversations(n: int, seed: int = 0) -> Iterator[list[dict[str, str]]]:
    """The corpus: the first n problems of the pretrain split, each with one careless solution."""
    rng = random.Random(f"llm2 testbed corpus {seed}")
    for story in islice(stories("pretrain"), n):
        yield _conversation(story.question, careless_solution(story, rng).text)


def two_skills_conversations(n: int, seed: int = 0) -> Iterator[list[dict[str, str]]]:
    """The corpus of a System 1 with two skills: in turn a careless solution, and a list that is sorted rightly."""
    word_problems = careless_conversations(n - n // 2, seed)
    lists = (_conversation(each["question"], sorted_text(each["answer"])) for each in sorting_problems("pretrain", n))
    for index in range(n):
        yield next(lists if index % 2 else word_problems)


def _conversation(question: str, solution: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]


def careless_solution(story: Story, rng: random.Random) -> Solution:
    """The story as one careless author solves it."""
    values = list(story.values)  # the author's result of each step
    operands = [operand for step in story.steps for operand in (step.left, step.right)]
    given = sorted({operand.value for operand in operands if isinstance(operand, Given)})
    sentences, errors = [], []
    for index in _order(story.steps, rng):
        step, error = _read(story.steps[index], rng, given)
        may_skip = index < len(story.steps) - 1
        misreading = MISREADINGS.get(error)
        if may_skip and misreading and misreading.skip:
            values[index] = value_of(getattr(step, misreading.skip), values)
        elif may_skip and not error and rng.random() < SKIPPED:
            values[index], error = value_of(step.left, values), "skipped"
        else:
            sentence, values[index], slip = _write(story, step, values, rng)
            sentences.append(sentence)
            error = error or slip
        errors += [error] if error else []
    return Solution(" ".join([*sentences, f"So the answer is {values[-1]}."]), values[-1], tuple(errors))


def _read(step: Step, rng: random.Random, given: list[int]) -> tuple[Step, str]:
    """The step as the author understands it, and the error in it, or ""; `given` holds the problem's numbers."""
    misreading = MISREADINGS.get(step.phrase)
    if misreading and rng.random() < misreading.rate:
        right = step.right if misreading.right is None else Given(misreading.right)
        return step._replace(operator=misreading.operator or step.operator, right=right), step.phrase
    if rng.random() < WRONG_OPERAND:
        others = [value for value in given if Given(value) != step.right]
        if others:
            return step._replace(right=Given(rng.choice(others))), "operand"
    if step.operator in "+*" and not step.phrase and rng.random() < SWAPPED:
        return step._replace(left=step.right, right=step.left), ""
    return step, ""


def _write(story: Story, step: Step, values: list[int], rng: random.Random) -> tuple[str, int, str]:
    """The author's sentence for the step, the result in it, and "slip" if that is off, else ""."""
    left, right = value_of(step.left, values), value_of(step.right, values)
    if step.operator == "-" and left < right:
        left, right = right, left  # after an earlier error: the author subtracts the smaller number
    result, slip = calculate(left, step.operator, right), ""
    if rng.random() < SLIP:
        result, slip = abs(result + rng.choice((-10, -1, 1, 10))), "slip"
    wording = rng.randrange(1, len(step.sentences)) if rng.random() < PARAPHRASED else 0
    return story.say(step, f"{left} {step.operator} {right} = {result}", wording), result, slip


def _order(steps: tuple[Step, ...], rng: random.Random) -> list[int]:
    """Indices of the steps in story order, or in another valid one."""
    if rng.random() >= REORDERED:
        return list(range(len(steps)))
    return valid_order(steps, rng)
