"""Word problems as programs: a story combines facts into a question and the steps of its solution.

A scenario lists facts that make a sensible story; words and numbers are drawn and steps computed here.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llm2.testbed.facts import PEOPLE, TABLES, WORDS, Fact, Person, Sentences

SMALLEST = 2
MAX_DRAWS = 8  # of a fact's numbers, before the story is discarded


class Given(NamedTuple):
    """An operand given in the question, or a constant such as the 12 of a dozen."""

    value: int


class Computed(NamedTuple):
    """An operand that is the result of an earlier step."""

    step: int


Operand = Given | Computed


class Step(NamedTuple):
    """One calculation of a solution, and the sentences that state it."""

    left: Operand
    operator: str
    right: Operand
    sentences: Sentences  # templates with {equation} and the story's words to fill in
    phrase: str  # the misreadable wording of the question behind this step, or ""


@dataclass(frozen=True)
class Story:
    """A word problem: question, steps of the solution, and their results."""

    question: str
    steps: tuple[Step, ...]
    values: tuple[int, ...]  # the result of each step
    slots: dict[str, str]  # who, things and the other words that fill templates

    def say(self, step: Step, equation: str, wording: int = 0) -> str:
        return step.sentences[wording].format(equation=equation, **self.slots)


class Scenario(NamedTuple):
    """Tables of facts that make a sensible story."""

    weight: float
    tables: tuple[str, ...]  # of facts.toml; a story takes one fact of each
    slots: dict[str, str] = {}  # words that are not drawn


class Limits(NamedTuple):
    """The largest results of a story's steps."""

    sum: int
    product: int

    def allow(self, operator: str, value: int) -> bool:
        return SMALLEST <= value <= (self.product if operator == "*" else self.sum)


SCENARIOS = (
    Scenario(3.0, ("holdings", "changes", "closings")),
    Scenario(2.0, ("holdings", "changes", "changes", "closings")),
    Scenario(0.7, ("daily", "closings")),
    Scenario(1.5, ("daily", "changes", "closings")),
    Scenario(1.0, ("daily", "books"), {"things": "pages", "gathers": "reads"}),
    Scenario(1.5, ("holdings", "second_person", "two_people")),
    Scenario(1.0, ("holdings", "changes", "second_person", "two_people")),
    Scenario(1.5, ("holdings", "second_person", "third_person", "three_people")),
    Scenario(1.5, ("sales", "second_month", "sales_closings")),
    Scenario(2.0, ("purchases", "more_purchases", "payments")),
    Scenario(0.5, ("wages", "money_left"), {"things": "dollars"}),
    Scenario(1.5, ("wages", "spending", "money_left"), {"things": "dollars"}),
)

LEARNT = Limits(150, 100)  # arithmetic that a small System 1 can learn


@dataclass(frozen=True)
class Variety:
    """Restricts which stories are drawn."""

    scenarios: tuple[Scenario, ...] = SCENARIOS
    people: tuple[Person, ...] = PEOPLE
    things: tuple[str, ...] = WORDS["things"]
    steps: range = range(1, 7)
    limits: Limits = LEARNT
    beyond: bool = False  # at least one result is larger than in System 1's training data


def calculate(left: int, operator: str, right: int) -> int:
    """The result of an operation; division rounds down."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    return left * right if operator == "*" else left // right


def draw_story(rng: random.Random, variety: Variety) -> Story | None:
    """A random story, or None if its numbers do not work out (a remainder, a negative or too large result)."""
    scenario = _draw(rng, variety.scenarios)
    slots = _draw_words(rng, variety) | scenario.slots
    draft = _Draft(rng, slots, variety.limits)
    for table in scenario.tables:
        if not draft.add(_draw(rng, TABLES[table])):
            return None
    learnt = all(LEARNT.allow(step.operator, value) for step, value in zip(draft.steps, draft.values, strict=True))
    if len(draft.steps) not in variety.steps or (variety.beyond and learnt):
        return None
    return Story(" ".join(draft.sentences), tuple(draft.steps), tuple(draft.values), slots)


class _Draft:
    """A story under construction."""

    def __init__(self, rng: random.Random, slots: dict[str, str], limits: Limits):
        self.rng, self.slots, self.limits = rng, slots, limits
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
            divisor = value_of(right, values)
            value = calculate(value_of(left, values), operator, divisor)
            if not self.limits.allow(operator, value) or (operator == "/" and value_of(left, values) % divisor):
                return False
            quantities[result] = Computed(len(values))
            values.append(value)
            steps.append(Step(left, operator, right, sentences, "" if index else fact.phrase))
        self.steps += steps
        self.values, self.quantities = values, quantities
        return True


def value_of(operand: Operand, values: Sequence[int]) -> int:
    return operand.value if isinstance(operand, Given) else values[operand.step]


def _draw(rng: random.Random, options: Sequence):
    return rng.choices(options, [option.weight for option in options])[0]


def _draw_words(rng: random.Random, variety: Variety) -> dict[str, str]:
    (who, he, his), (other, *_), (third, *_) = rng.sample(variety.people, 3)
    things, things2 = rng.sample(variety.things, 2)
    month = rng.randrange(len(WORDS["months"]) - 1)
    return {
        "who": who,
        "he": he,
        "He": he.capitalize(),
        "his": his,
        "other": other,
        "third": third,
        "things": things,
        "things2": things2,
        "boxes": rng.choice(WORDS["boxes"]),
        "gathers": rng.choice(WORDS["gathers"]),
        "month": WORDS["months"][month],
        "month2": WORDS["months"][month + 1],
    }
