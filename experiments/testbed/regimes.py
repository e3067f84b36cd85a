"""Regimes of the testbed beside `same`, and a second skill, each with problems of its own (README.md).

As tasks: task=experiments.testbed.regimes:Foreign and so on. All is in one file because a run records its digest.

Foreign solutions are terse, two steps per line, some without working, always right. They differ from System 1's
solutions as GSM8K's human solutions differ from a model's chain of thought.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from llm2.errors import UserError
from llm2.tasks import Problem, Task
from llm2.tasks.testbed import Testbed
from llm2.testbed.generator import SAME, SIZES, Regime, split_of
from llm2.testbed.stories import Computed, Limits, Operand, Scenario, Step, Story, Variety

NESTED = 0.2  # share of lines, of those whose second step uses the first, that are one calculation with brackets
UNWORKED = 0.15  # share of the other steps that state only the result
LINES = ("{steps}.", "Here {steps}.", "We get {steps}.", "{steps} then.")

LONG_SCENARIOS = (
    Scenario(1.0, ("holdings", *["changes"] * 3, "closings")),
    Scenario(1.0, ("holdings", *["changes"] * 4, "closings")),
    Scenario(0.5, ("daily", *["changes"] * 3, "closings")),
)
# Words that are not in System 1's training data
NEW_PEOPLE = tuple((name, "she", "her") for name in ("Olga", "Greta", "Ines", "Wilma"))
NEW_PEOPLE += tuple((name, "he", "his") for name in ("Igor", "Hugo", "Vikram", "Quentin"))
NEW_THINGS = ("buttons", "candles", "lemons", "walnuts", "zips")

SORT = ("Sort these numbers: {}.", "Put the numbers {} in order, the smallest first.")
LENGTHS = range(3, 7)
LARGEST = 99


def foreign_answer(story: Story) -> str:
    """The solution in GSM8K's format, without annotations; a question always gets the same one."""
    rng = random.Random(f"llm2 testbed foreign {story.question}")
    order = valid_order(story.steps, rng)
    lines = [_line(story, order[start : start + 2], rng) for start in range(0, len(order), 2)]
    return "\n".join([*lines, f"#### {story.values[-1]}"])


def _line(story: Story, group: list[int], rng: random.Random) -> str:
    """One or two steps in a line."""
    first, last = group[0], group[-1]
    last_step = story.steps[last]
    if Computed(first) in (last_step.left, last_step.right) and rng.random() < NESTED:
        steps = [_equation(story, last, nested=first)]
    else:
        steps = [str(story.values[i]) if rng.random() < UNWORKED else _equation(story, i) for i in group]
    return rng.choice(LINES).format(steps=" and ".join(steps))


def _equation(story: Story, index: int, nested: int | None = None) -> str:
    return f"{_expression(story, index, nested)} = {story.values[index]}"


def _expression(story: Story, index: int, nested: int | None) -> str:
    """The step's calculation, with that of the step `nested` in brackets for its result."""

    def operand(operand: Operand) -> str:
        if not isinstance(operand, Computed):
            return str(operand.value)
        return f"({_expression(story, nested, None)})" if operand.step == nested else str(story.values[operand.step])

    step = story.steps[index]
    return f"{operand(step.left)} {step.operator} {operand(step.right)}"


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


def final_answer(story: Story) -> str:
    """The answer alone, in GSM8K's format."""
    return f"#### {story.values[-1]}"


REGIMES = {
    "same": SAME,
    "foreign": Regime("foreign", foreign_answer),
    "answers": Regime("answers", final_answer),
    "careful": Regime("careful"),
    "two_skills": Regime("two_skills"),
    # Unlike System 1's training data
    "more_steps": Regime("more_steps", variety=Variety(LONG_SCENARIOS, steps=range(7, 10))),
    "new_words": Regime("new_words", variety=Variety(people=NEW_PEOPLE, things=NEW_THINGS)),
    "large_numbers": Regime("large_numbers", variety=Variety(limits=Limits(999, 999), beyond=True)),
}


class Foreign(Testbed):
    """Gold solutions in another style than System 1's."""

    regime = REGIMES["foreign"]


class Answers(Testbed):
    """Final answers without solutions."""

    regime = REGIMES["answers"]

    def source(self, split: str, limit: int | None) -> list[Problem]:
        return [replace(problem, solution="") for problem in super().source(split, limit)]


class Careful(Testbed):
    """For a System 1 that was fine-tuned on gold solutions."""

    regime = REGIMES["careful"]


class TwoSkills(Testbed):
    """For a System 1 that sorts lists too."""

    regime = REGIMES["two_skills"]


class MoreSteps(Testbed):
    """Longer problems than System 1 was trained on."""

    regime = REGIMES["more_steps"]


class NewWords(Testbed):
    """Names and things that System 1 was not trained on."""

    regime = REGIMES["new_words"]


class LargeNumbers(Testbed):
    """Larger results than System 1 was trained on."""

    regime = REGIMES["large_numbers"]


class Sorting(Task):
    """Lists of numbers to sort: the second skill."""

    def problems(self, split: str, limit: int | None = None) -> list[Problem]:
        if split not in SIZES:
            raise UserError(f"testbed has no split {split!r}: expected one of {', '.join(SIZES)}")
        return [
            Problem(record["id"], record["question"], record["answer"], sorted_text(record["answer"]))
            for record in sorting_problems(split, limit)
        ]

    def extract_answer(self, text: str) -> str | None:
        lists = re.findall(r"\d+(?:, \d+)+", text)
        return lists[-1] if lists else None


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
        question = rng.choice(SORT).format(_join(numbers))
        if split_of(question) == split and question not in seen:
            seen.add(question)
            yield question, _join(sorted(numbers))


def _join(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


# The tasks as studies named them when their first runs were published, whose digests are of those names.
FORMER_NAMES = {
    f"{__name__}:{task.__name__}": name
    for name, task in {
        "testbed_foreign": Foreign,
        "testbed_answers": Answers,
        "testbed_careful": Careful,
        "testbed_two_skills": TwoSkills,
        "testbed_more_steps": MoreSteps,
        "testbed_new_words": NewWords,
        "testbed_large_numbers": LargeNumbers,
        "testbed_sorting": Sorting,
    }.items()
}
