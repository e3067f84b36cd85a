"""Worked examples before each problem, as turns of the chat.

Knows the published 8-shot chain of thought (Wei et al., 2022), as lm-evaluation-harness ships it, and local files of
worked problems. Zero-shot, as in the paper, is no examples at all.
"""

from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import yaml

from llm2.errors import UserError
from llm2.tasks import problem_of
from llm2.tasks.gsm8k import file_records

PUBLISHED = "gsm8k-cot"


def load_examples(source: str | None, shots: int | None = None) -> list[dict[str, str]]:
    """Messages of user and assistant in turn; none for None.

    Args:
        source: `gsm8k-cot`, or a JSON lines file in GSM8K's format.
        shots: the first so many examples; all when None.
    """
    if source is None:
        return []
    pairs = _published() if source == PUBLISHED else _of_file(source)
    chosen = list(islice(pairs, shots))
    if shots is not None and len(chosen) < shots:
        raise UserError(f"few_shot: {source} holds {len(chosen)} examples, expected at least shots={shots}")
    return [
        {"role": role, "content": text}
        for question, solution in chosen
        for role, text in (("user", question), ("assistant", solution))
    ]


def _published() -> list[tuple[str, str]]:
    harness = find_spec("lm_eval")
    if harness is None:
        raise UserError(f"few_shot={PUBLISHED} reads the examples from lm-evaluation-harness: pip install lm-eval")
    path = Path(harness.submodule_search_locations[0], "tasks", "gsm8k", "gsm8k-cot.yaml")
    samples = yaml.safe_load(path.read_text())["fewshot_config"]["samples"]
    return [(sample["question"], sample["target"]) for sample in samples]


def _of_file(path: str) -> list[tuple[str, str]]:
    problems = map(problem_of, file_records(path, "example"))
    return [(problem.question, problem.solution) for problem in problems]
