"""Tokenize right solutions, check them against grading and chat template, find their forks, grade their rollouts."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llm2.common.chat import Message, encode_chats, resolve_template
from llm2.common.seeds import row_seed
from llm2.config import ModelConfig
from llm2.errors import UserError
from llm2.exploration.engines import Continuations, Engine, PositionQuery, Request
from llm2.exploration.quality import Fork
from llm2.tasks import Problem, Task, read_problems, require_distinct_ids


@dataclass(frozen=True)
class TokenizedSolution:
    """A problem with the token ids of its gold solution or of an own solution."""

    problem: Problem
    messages: list[Message]  # the prompt and the gold solution
    ids: list[int]  # the whole conversation
    start: int  # position of the assistant's first token
    end: int  # one past the token that ends its turn
    vocabulary: int  # size of the tokenizer's vocabulary; the model's may be larger

    def rollout_request(self, position: int, token: int, seed: int, indices: Iterable[int]) -> Request:
        """Rollouts from `token` at `position`; a rollout's seed depends on its index, not on run or batch."""
        seeds = [row_seed(seed, self.problem.id, position, token, i) for i in indices]
        return Request(self.ids, position, (token,), seeds, self.problem.id)

    def grade_rollouts(
        self, task: Task, tokenizer: PreTrainedTokenizerBase, position: int, token: int, continuations: Continuations
    ) -> list[bool]:
        """Whether each continuation of `token` at `position` ends in the right answer."""
        begin = [*self.ids[self.start : position], token]
        texts = tokenizer.batch_decode([[*begin, *tokens] for tokens in continuations], skip_special_tokens=True)
        return [grade.correct for grade in task.grade(texts, self.problem.gold)]


def load_problems(task: Task, split: str, limit: int | None, need_gold: bool = True) -> tuple[list[Problem], int]:
    """The problems without duplicate conversations, and the number of duplicates.

    Raises UserError if two problems share an id or, with need_gold, the grader rejects a gold solution.
    """
    loaded = read_problems(task, split, limit)
    distinct: dict[str, Problem] = {}
    for problem in loaded:
        messages = task.conversation(problem) if need_gold else task.prompt(problem)
        distinct.setdefault(json.dumps(messages), problem)
    problems = list(distinct.values())
    require_distinct_ids(task, problems)
    where = f"{task.data_file}: " if task.data_file else ""
    for problem in problems:
        if not need_gold:
            continue
        if not problem.solution:
            raise UserError(f"{where}problem {problem.id} has no gold solution; expected one, or solutions=own")
        if not task.grade([problem.solution], problem.gold)[0].correct:
            raise UserError(
                f"{where}problem {problem.id}: the grader rejects the gold solution, which ends in "
                f"{problem.solution[-40:]!r}, for the answer {problem.gold[-40:]!r}"
            )
    return problems, len(loaded) - len(problems)


def check_template(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, task: Task, problem: Problem) -> None:
    """Raise UserError, before weights are loaded, if the chat template cannot write the problem's prompt."""
    encode_chats(tokenizer, [task.prompt(problem)], resolve_template(config.chat_template), generation_prompt=True)


def tokenize_solutions(
    task: Task,
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    eos: Sequence[int],
) -> list[TokenizedSolution]:
    """Tokenize solutions. Raises UserError if the prompt's tokens are not a prefix of the conversation's."""
    conversations = [task.conversation(problem) for problem in problems]
    whole = encode_chats(tokenizer, conversations, template)
    prompts = encode_chats(tokenizer, [messages[:-1] for messages in conversations], template, generation_prompt=True)
    solutions = []
    for problem, messages, ids, prompt in zip(problems, conversations, whole, prompts, strict=True):
        start = len(prompt)
        if ids[:start] != prompt:
            behind = tokenizer.decode(ids).removeprefix(tokenizer.decode(prompt))
            if behind.lstrip().startswith(messages[-1]["content"].lstrip()[:10]):
                raise UserError(
                    f"problem {problem.id}: the solution begins with {problem.solution[:10]!r}, which the tokenizer "
                    "joins to the end of the prompt; expected another beginning, such as no spaces"
                )
            raise UserError(
                f"problem {problem.id}: the chat template writes another prompt before generation than in the whole "
                "conversation; expected one that only appends (llama3-plain or chatml-plain)"
            )
        end = next((i + 1 for i in range(start, len(ids)) if ids[i] in eos), len(ids))
        solutions.append(TokenizedSolution(problem, messages, ids, start, end, len(tokenizer)))
    return solutions


def find_forks(engine: Engine, solutions: Sequence[TokenizedSolution]) -> list[list[Fork]]:
    """The forks of each solution, by position. A fork's first token is gold, plausible or not."""
    queries = [PositionQuery(solution.ids, solution.start, solution.end) for solution in solutions]
    forks: list[list[Fork]] = [[] for _ in solutions]
    for solution, positions, solution_forks in zip(solutions, engine.plausible(queries), forks, strict=True):
        for position, candidates in enumerate(positions, start=solution.start):
            candidates = [candidate for candidate in candidates if candidate[0] < solution.vocabulary]
            if len(candidates) > 1:
                probability, gold = dict(candidates), solution.ids[position]
                tokens = (gold, *(token for token, _ in candidates if token != gold))
                probabilities = tuple(probability.get(token, 0.0) for token in tokens)
                solution_forks.append(Fork(position, tokens, probabilities))
    return forks
