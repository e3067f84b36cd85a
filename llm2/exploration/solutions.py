"""Gold solutions to explore along: from any source to token ids, held against the checker and the chat template."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llm2.common.chat import encode_chats
from llm2.config import ExploreConfig
from llm2.errors import UserError
from llm2.tasks import Problem, load_problems
from llm2.tasks.chats import Chat, load_chats
from llm2.tasks.checkers import Checker

Solved = Problem | Chat  # both have an id, a conversation, its prompt, its solution and the gold answer


@dataclass(frozen=True)
class TokenizedSolution:
    """A problem with its solution's token ids."""

    problem: Solved
    ids: list[int]  # the whole conversation
    start: int  # first token that the assistant chose
    end: int  # one past the token that ends its turn


def load_solved(config: ExploreConfig, checker: Checker) -> tuple[list[Solved], int]:
    """The problems, each conversation once, and how many were dropped as repetitions."""
    if config.task == "chats":
        found = load_chats(config.data_file, checker, config.limit)
    else:
        found = load_problems(config.task, config.split, config.limit, config.data_file)
    distinct: dict[str, Solved] = {}
    for problem in found:
        distinct.setdefault(json.dumps(problem.conversation), problem)
    problems = list(distinct.values())
    names = Counter(problem.id for problem in problems)
    for problem in problems:
        if names[problem.id] > 1:
            raise UserError(
                f"{config.data_file}: the id {problem.id!r} stands for {names[problem.id]} problems, expected one"
            )
        if not checker(problem.solution, problem.gold):
            raise UserError(
                f"problem {problem.id}: the checker {config.grader} does not accept the gold solution, which ends in "
                f"{problem.solution[-40:]!r}, for the answer {problem.gold!r}"
            )
    return problems, len(found) - len(problems)


def tokenize_solutions(
    problems: Sequence[Solved], tokenizer: PreTrainedTokenizerBase, template: str | None, eos: Sequence[int]
) -> list[TokenizedSolution]:
    """Raises UserError where the prompt's tokens do not begin those of the whole conversation."""
    whole = encode_chats(tokenizer, [problem.conversation for problem in problems], template)
    prompts = encode_chats(tokenizer, [problem.prompt for problem in problems], template, generation_prompt=True)
    golds = []
    for problem, ids, prompt in zip(problems, whole, prompts, strict=True):
        start = len(prompt)
        if ids[:start] != prompt:
            raise UserError(
                f"problem {problem.id}: the chat template writes another prompt before generation than in the whole "
                "conversation; expected one that only appends (llama3-plain or chatml-plain)"
            )
        end = next((i + 1 for i in range(start, len(ids)) if ids[i] in eos), len(ids))
        golds.append(TokenizedSolution(problem, ids, start, end))
    return golds
