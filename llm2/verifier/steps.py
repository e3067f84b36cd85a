"""Solutions in steps, in the format of TRL's former PRMTrainer: `prompt`, `completions` (the steps) and `labels`.

Each step is a line of the answer. Its score is that of its last token.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm2.common.chat import Message, check_messages, render
from llm2.errors import UserError, quote

ABSENT = -1  # in place of a negative token; its score is 0, so that a step's margin is its score
MARK = "\ue000"  # a private character, in place of an answer


def as_text(solution: str | Sequence[str]) -> str:
    """A solution, or its steps as lines, without white space around them."""
    return solution if isinstance(solution, str) else "\n".join(step.strip() for step in solution)


def read_steps(record: Mapping[str, Any], where: str) -> tuple[list[Message], list[str]]:
    """The prompt's messages and the steps of a record. Raises UserError, prefixed with `where`, if they misfit."""
    prompt, steps = record.get("prompt"), record["completions"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: key 'prompt': expected a text or messages, found {quote(prompt)}")
    check_messages(messages, where, "prompt")
    check_steps(steps, where, "completions")
    return messages, steps


def check_steps(steps: Any, where: str, key: str) -> None:
    if not isinstance(steps, list) or not steps:
        raise UserError(f"{where}: key {key!r}: expected a list of steps that is not empty, found {quote(steps)}")
    if wrong := [step for step in steps if not isinstance(step, str) or not step.strip()]:
        raise UserError(f"{where}: key {key!r}: expected a step's text, found {quote(wrong[0])}")


def read_labels(record: Mapping[str, Any], where: str) -> list[bool]:
    labels, count = record.get("labels"), len(record["completions"])
    if not isinstance(labels, list) or len(labels) != count or any(type(label) is not bool for label in labels):
        raise UserError(
            f"{where}: key 'labels': expected true or false for each of the {count} completions, found {quote(labels)}"
        )
    return labels


def step_ends(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    steps: Sequence[str],
    template: str | None,
    where: str,
) -> list[int]:
    """Positions of the steps' last tokens in the ids of the prompt's messages and the answer.

    Raises UserError, prefixed with `where`, if the template changes the answer, if two steps end in one token, or if
    a step ends in the text's first one, which has no prefix.
    """
    if not tokenizer.is_fast:
        raise UserError(f"steps need a fast tokenizer, which says where tokens stand; {tokenizer.name_or_path} is none")
    text, marked = (
        render(tokenizer, [*messages, {"role": "assistant", "content": content}], template)
        for content in (as_text(steps), MARK)
    )
    head, _, tail = marked.rpartition(MARK)
    if text != head + as_text(steps) + tail:
        raise UserError(f"{where}: the chat template changes the text of the steps {quote(steps)}")
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    starts = [start for start, _ in offsets]
    after = accumulate(len(step.strip()) + 1 for step in steps)
    ends = [bisect_left(starts, len(head) + end - 1) - 1 for end in after]
    if len({0, *ends}) <= len(ends):
        raise UserError(f"{where}: the steps {quote(steps)} share a token; expected the last of each to be its own")
    return ends
