"""Gold solutions by another school than System 1's: terse, two steps in a line, results without working, always right.

Beside System 1's own steps they are what GSM8K's human solutions are beside a model's chain of thought.
"""

import random

from llm2.testbed.stories import Computed, Operand, Story, valid_order

WITHOUT_WORKING = 0.4  # of lines whose steps do not build on each other: only the results
WORKED = ("{expression} comes to {result}.", "We get {result} out of {expression}.", "{result}, being {expression}.")
UNWORKED = ("Hence {result}.", "We get {result}.", "It comes to {result} then.")


def foreign_answer(story: Story) -> str:
    """The solution in GSM8K's format, without annotations; one and the same for a question, whenever it is drawn."""
    rng = random.Random(f"llm2 testbed foreign {story.question}")
    order = valid_order(story.steps, rng)
    lines = [_line(story, order[start : start + 2], rng) for start in range(0, len(order), 2)]
    return "\n".join([*lines, f"#### {story.values[-1]}"])


def _line(story: Story, group: list[int], rng: random.Random) -> str:
    """One or two steps in a line; of two that build on each other the second one's result, as one calculation."""
    last = story.steps[group[-1]]
    inner = group[0] if Computed(group[0]) in (last.left, last.right) else None
    written = group[-1:] if inner is not None else group
    expressions = [_expression(story, index, inner) for index in written]
    result = " and ".join(str(story.values[index]) for index in written)
    lines = UNWORKED if inner is None and rng.random() < WITHOUT_WORKING else WORKED
    return rng.choice(lines).format(expression=" and ".join(expressions), result=result)


def _expression(story: Story, index: int, inner: int | None) -> str:
    """The step's calculation, with that of the step `inner` in brackets where it builds on it."""

    def operand(operand: Operand) -> str:
        if not isinstance(operand, Computed):
            return str(operand.value)
        return f"({_expression(story, inner, None)})" if operand.step == inner else str(story.values[operand.step])

    step = story.steps[index]
    return f"{operand(step.left)} {step.operator} {operand(step.right)}"
