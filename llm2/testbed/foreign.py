"""Gold solutions in another style than System 1's: terse, two steps per line, some without working, always right.

They differ from System 1's solutions as GSM8K's human solutions differ from a model's chain of thought.
"""

import random

from llm2.testbed.stories import Computed, Operand, Story, valid_order

NESTED = 0.2  # share of lines, of those whose second step uses the first, that are one calculation with brackets
UNWORKED = 0.15  # share of the other steps that state only the result
LINES = ("{steps}.", "Here {steps}.", "We get {steps}.", "{steps} then.")


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
