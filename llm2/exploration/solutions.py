"""Gold solutions to explore along, as token ids, checked against the task's grading and the chat template."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llm2.common.chat import Message, encode_chats
from llm2.config import ExploreConfig
from llm2.errors import UserError
from llm2.tasks import Problem, Task


@dataclass(frozen=True)
class TokenizedSolution:
    """A problem with the token ids of its gold solution."""

    problem: Problem
    messages: list[Message]  # the prompt and the gold solution
    ids: list[int]  # the whole conversation
    start: int  # first token that the assistant chose
    end: int  # one past the token that ends its turn


def load_solved(config: ExploreConfig, task: Task) -> tuple[list[Problem], int]:
    """The problems, each conversation once, and how many repetitions were dropped.

    Raises UserError where two problems share an id or the task's grading rejects a gold solution.
    """
    loaded = task.problems(config.split, config.limit)
    distinct: dict[str, Problem] = {}
    for problem in loaded:
        distinct.setdefault(json.dumps(task.conversation(problem)), problem)
    problems = list(distinct.values())
    names = Counter(problem.id for problem in problems)
    for problem in problems:
        if names[problem.id] > 1:
            raise UserError(
                f"{config.data_file}: the id {problem.id!r} stands for {names[problem.id]} problems, expected one"
            )
        if not task.grade([problem.solution], problem.gold)[0].correct:
            raise UserError(
                f"problem {problem.id}: the grader {config.grader or config.task} does not accept the gold solution, "
                f"which ends in {problem.solution[-40:]!r}, for the answer {problem.gold[-40:]!r}"
            )
    return problems, len(loaded) - len(problems)


def tokenize_solutions(
    task: Task,
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    eos: Sequence[int],
) -> list[TokenizedSolution]:
    """Raises UserError where the prompt's tokens do not begin those of the whole conversation."""
    conversations = [task.conversation(problem) for problem in problems]
    whole = encode_chats(tokenizer, conversations, template)
    prompts = encode_chats(tokenizer, [messages[:-1] for messages in conversations], template, generation_prompt=True)
    solutions = []
    for problem, messages, ids, prompt in zip(problems, conversations, whole, prompts, strict=True):
        start = len(prompt)
        if ids[:start] != prompt:
            raise UserError(
                f"problem {problem.id}: the chat template writes another prompt before generation than in the whole "
                "conversation; expected one that only appends (llama3-plain or chatml-plain)"
            )
        end = next((i + 1 for i in range(start, len(ids)) if ids[i] in eos), len(ids))
        solutions.append(TokenizedSolution(problem, messages, ids, start, end))
    return solutions
