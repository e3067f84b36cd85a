"""Word problems as programs: a story combines facts into a question and the steps of its solution.

A scenario says which facts make a sensible story; its words and numbers are drawn and its steps computed here.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llm2.testbed import facts, money, words
from llm2.testbed.facts import Fact, Table
from llm2.testbed.words import Sentences

LARGEST_SUM, LARGEST_PRODUCT, SMALLEST = 150, 100, 2  # arithmetic that a small System 1 can learn
MAX_STEPS = 6
MAX_DRAWS = 8  # of a fact's numbers, before the story is given up


class Given(NamedTuple):
    """An operand given in the question, or a constant such as the 12 of a dozen."""

    value: int


class Computed(NamedTuple):
    """An operand that is the result of an earlier step."""

    step: int


Operand = Given | Computed


class Step(NamedTuple):
    left: Operand
    operator: str
    right: Operand
    sentences: Sentences  # templates with {equation} and the story's words to fill in
    phrase: str  # the misreadable wording of the question behind this step, or ""


@dataclass(frozen=True)
class Story:
    question: str
    steps: tuple[Step, ...]
    values: tuple[int, ...]  # the result of each step
    slots: dict[str, str]  # who, things and the other words that fill templates

    def say(self, step: Step, equation: str, wording: int = 0) -> str:
        return step.sentences[wording].format(equation=equation, **self.slots)


class Scenario(NamedTuple):
    weight: float
    tables: tuple[Table, ...]  # a story takes one fact of each
    slots: dict[str, str] = {}  # words that are not drawn


SCENARIOS = (
    Scenario(3.0, (facts.HOLDINGS, facts.CHANGES, facts.CLOSINGS)),
    Scenario(2.0, (facts.HOLDINGS, facts.CHANGES, facts.CHANGES, facts.CLOSINGS)),
    Scenario(0.7, (facts.DAILY, facts.CLOSINGS)),
    Scenario(1.5, (facts.DAILY, facts.CHANGES, facts.CLOSINGS)),
    Scenario(1.0, (facts.DAILY, money.BOOKS), {"things": "pages", "gathers": "reads"}),
    Scenario(1.5, (facts.HOLDINGS, facts.SECOND_PERSON, facts.TWO_PEOPLE)),
    Scenario(1.0, (facts.HOLDINGS, facts.CHANGES, facts.SECOND_PERSON, facts.TWO_PEOPLE)),
    Scenario(1.5, (facts.HOLDINGS, facts.SECOND_PERSON, facts.THIRD_PERSON, facts.THREE_PEOPLE)),
    Scenario(1.5, (facts.SALES, facts.SECOND_MONTH, facts.SALES_CLOSINGS)),
    Scenario(2.0, (money.PURCHASES, money.MORE_PURCHASES, money.PAYMENTS)),
    Scenario(0.5, (money.WAGES, money.MONEY_LEFT), {"things": "dollars"}),
    Scenario(1.5, (money.WAGES, money.SPENDING, money.MONEY_LEFT), {"things": "dollars"}),
)


def calculate(left: int, operator: str, right: int) -> int:
    """The result of an operation; division rounds down."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    return left * right if operator == "*" else left // right


def draw_story(rng: random.Random) -> Story | None:
    """A random story, or None if its numbers do not work out (a remainder, a negative or too large result)."""
    scenario = _weighted(rng, SCENARIOS)
    slots = _draw_words(rng) | scenario.slots
    draft = _Draft(rng, slots)
    for table in scenario.tables:
        if not draft.add(_weighted(rng, table)):
            return None
    if not 1 <= len(draft.steps) <= MAX_STEPS:
        return None
    return Story(" ".join(draft.sentences), tuple(draft.steps), tuple(draft.values), slots)


class _Draft:
    """A story under construction."""

    def __init__(self, rng: random.Random, slots: dict[str, str]):
        self.rng, self.slots = rng, slots
        self.sentences: list[str] = []
        self.steps: list[Step] = []
        self.values: list[int] = []
        self.quantities: dict[str, Operand] = {}  # by name, of the facts added so far

    def add(self, fact: Fact) -> bool:
        """Draw the fact's numbers and add its sentence and steps; False if no draw works out."""
        for _ in range(MAX_DRAWS):
            numbers = {name: self.rng.choice(allowed) for name, allowed in fact.numbers.items()}
            if self._compute(fact, numbers):
                template = self.rng.choice(fact.templates)
                if template:
                    self.sentences.append(template.format(**self.slots, **numbers))
                return True
            if not numbers:
                return False
        return False

    def _compute(self, fact: Fact, numbers: dict[str, int]) -> bool:
        quantities = self.quantities | {name: Given(value) for name, value in numbers.items()}
        steps, values = [], list(self.values)
        for index, (formula, sentences) in enumerate(fact.calculations):
            result, _, left, operator, right = formula.split()
            left, right = quantities.get(left) or Given(int(left)), quantities.get(right) or Given(int(right))
            value = _allowed_result(value_of(left, values), operator, value_of(right, values))
            if value is None:
                return False
            quantities[result] = Computed(len(values))
            values.append(value)
            steps.append(Step(left, operator, right, sentences, "" if index else fact.phrase))
        self.steps += steps
        self.values, self.quantities = values, quantities
        return True


def value_of(operand: Operand, values: Sequence[int]) -> int:
    return operand.value if isinstance(operand, Given) else values[operand.step]


def _allowed_result(left: int, operator: str, right: int) -> int | None:
    """The result, or None for a division with a remainder and results outside the limits above."""
    if operator == "/" and left % right:
        return None
    value = calculate(left, operator, right)
    return value if SMALLEST <= value <= (LARGEST_PRODUCT if operator == "*" else LARGEST_SUM) else None


def valid_order(steps: Sequence[Step], rng: random.Random) -> list[int]:
    """Indices of the steps in a random order where each follows those it depends on; the last step stays last."""
    order, waiting = [], list(range(len(steps) - 1))
    while waiting:
        ready = [index for index in waiting if _dependencies(steps[index]) <= set(order)]
        order.append(rng.choice(ready))
        waiting.remove(order[-1])
    return [*order, len(steps) - 1]


def _dependencies(step: Step) -> set[int]:
    return {operand.step for operand in (step.left, step.right) if isinstance(operand, Computed)}


def _weighted(rng: random.Random, options: Sequence):
    return rng.choices(options, [option.weight for option in options])[0]


def _draw_words(rng: random.Random) -> dict[str, str]:
    (who, he, his), (other, *_), (third, *_) = rng.sample(words.PEOPLE, 3)
    things, things2 = rng.sample(words.THINGS, 2)
    month = rng.randrange(len(words.MONTHS) - 1)
    return {
        "who": who,
        "he": he,
        "He": he.capitalize(),
        "his": his,
        "other": other,
        "third": third,
        "things": things,
        "things2": things2,
        "boxes": rng.choice(words.BOXES),
        "gathers": rng.choice(words.GATHERS),
        "month": words.MONTHS[month],
        "month2": words.MONTHS[month + 1],
    }
