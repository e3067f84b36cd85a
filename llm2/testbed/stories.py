"""Word problems as programs: facts strung together into a story, its question and its steps over named quantities.

Knows which facts make a sensible story, draws the words and numbers, and works the steps out. Leaves the wording of
facts to facts.py, splits and records to problems.py, careless solutions to corpus.py.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from llm2.testbed import facts, money, words
from llm2.testbed.facts import Fact, Table
from llm2.testbed.words import Sentences

LARGEST_SUM, LARGEST_PRODUCT, SMALLEST = 150, 100, 2  # results beyond these are not asked of a small System 1
MOST_STEPS = 6
NUMBER_TRIALS = 8  # draws of a fact's numbers before the story is given up


class Told(NamedTuple):
    """An operand that the question tells, or a constant such as the 12 of a dozen."""

    value: int


class Worked(NamedTuple):
    """An operand that an earlier step worked out."""

    step: int


Operand = Told | Worked


class Step(NamedTuple):
    left: Operand
    operator: str
    right: Operand
    sentences: Sentences  # {equation} and the story's words are still open
    phrase: str  # the wording of the question that this step reads, "" for plain ones


@dataclass(frozen=True)
class Story:
    question: str
    steps: tuple[Step, ...]
    values: tuple[int, ...]  # the result of each step
    slots: dict[str, str]  # who, things and the other words that fill its sentences

    def say(self, step: Step, equation: str, way: int = 0) -> str:
        return step.sentences[way].format(equation=equation, **self.slots)


class Scenario(NamedTuple):
    weight: float
    tables: tuple[Table, ...]  # a story takes one fact of each
    slots: dict[str, str] = {}  # words that this scenario fixes


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
    """The exact result; division rounds down, and callers that want exact division check the remainder."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    return left * right if operator == "*" else left // right


def draw_story(rng: random.Random) -> Story | None:
    """One story, or None when the numbers did not come out (a rest, a negative or too large a result)."""
    scenario = _weighted(rng, SCENARIOS)
    slots = _draw_words(rng) | scenario.slots
    draft = _Draft(rng, slots)
    for table in scenario.tables:
        if not draft.add(_weighted(rng, table)):
            return None
    if not 1 <= len(draft.steps) <= MOST_STEPS:
        return None
    return Story(" ".join(draft.sentences), tuple(draft.steps), tuple(draft.values), slots)


class _Draft:
    """A story while facts are added to it."""

    def __init__(self, rng: random.Random, slots: dict[str, str]):
        self.rng, self.slots = rng, slots
        self.sentences: list[str] = []
        self.steps: list[Step] = []
        self.values: list[int] = []
        self.names: dict[str, Operand] = {}  # named quantities known so far

    def add(self, fact: Fact) -> bool:
        """Draw the fact's numbers and take its steps; False when no draw came out."""
        for _ in range(NUMBER_TRIALS):
            numbers = {name: self.rng.choice(allowed) for name, allowed in fact.numbers.items()}
            if self._work_out(fact, numbers):
                telling = self.rng.choice(fact.tellings)
                if telling:
                    self.sentences.append(telling.format(**self.slots, **numbers))
                return True
            if not numbers:
                return False
        return False

    def _work_out(self, fact: Fact, numbers: dict[str, int]) -> bool:
        names = self.names | {name: Told(value) for name, value in numbers.items()}
        steps, values = [], list(self.values)
        for index, (formula, sentences) in enumerate(fact.lines):
            result, left, operator, right = _parse(formula)
            left, right = names.get(left) or Told(int(left)), names.get(right) or Told(int(right))
            value = _exact(value_of(left, values), operator, value_of(right, values))
            if value is None:
                return False
            names[result] = Worked(len(values))
            values.append(value)
            steps.append(Step(left, operator, right, sentences, "" if index else fact.phrase))
        self.steps += steps
        self.values, self.names = values, names
        return True


def value_of(operand: Operand, values: Sequence[int]) -> int:
    return operand.value if isinstance(operand, Told) else values[operand.step]


def _exact(left: int, operator: str, right: int) -> int | None:
    """The result if a small System 1 can be asked for it."""
    if operator == "/" and left % right:
        return None
    value = calculate(left, operator, right)
    return value if SMALLEST <= value <= (LARGEST_PRODUCT if operator == "*" else LARGEST_SUM) else None


@cache
def _parse(formula: str) -> tuple[str, str, str, str]:
    result, _, left, operator, right = formula.split()
    return result, left, operator, right


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
