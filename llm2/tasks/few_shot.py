"""Worked examples before each problem, as turns of the chat. None by default: zero-shot, as in the paper."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import yaml

from llm2.common.chat import Message
from llm2.errors import UserError
from llm2.tasks.gsm8k import read_problems

PUBLISHED = "gsm8k-cot"


def load_few_shot(source: str | None, num_fewshot: int | None = None) -> list[Message]:
    """Messages of user and assistant in turn; none when the source is None.

    Args:
        source: `gsm8k-cot`, the published 8-shot chain of thought (Wei et al., 2022) as lm-evaluation-harness ships it,
            or a JSON Lines file in GSM8K's format.
        num_fewshot: number of examples to take; all when None.
    """
    if source is None:
        return []
    if source == PUBLISHED:
        examples = _harness_examples()
    else:
        examples = [(problem.question, problem.solution) for problem in read_problems(source, "example")]
    if len(examples) < (num_fewshot or 0):
        raise UserError(f"few_shot: {source} has {len(examples)} examples, expected at least num_fewshot={num_fewshot}")
    return [
        {"role": role, "content": text}
        for question, solution in examples[:num_fewshot]
        for role, text in (("user", question), ("assistant", solution))
    ]


def with_examples(examples: Sequence[Message], prompt: Sequence[Message]) -> list[Message]:
    """The prompt with the examples between its system prompt and its first question."""
    start = 1 if prompt[0]["role"] in ("system", "developer") else 0
    return [*prompt[:start], *examples, *prompt[start:]]


def _harness_examples() -> list[tuple[str, str]]:
    harness = find_spec("lm_eval")
    if harness is None:
        raise UserError(f"few_shot={PUBLISHED} reads the examples from lm-evaluation-harness: pip install lm-eval")
    path = Path(harness.submodule_search_locations[0], "tasks", "gsm8k", "gsm8k-cot.yaml")
    samples = yaml.safe_load(path.read_text(encoding="utf-8"))["fewshot_config"]["samples"]
    return [(sample["question"], sample["target"]) for sample in samples]
