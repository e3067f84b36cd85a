"""Sample solutions from System 1, guided or not, grade them, and keep distinct right ones.

For exploration without gold solutions and for rejection-sampling fine-tuning; they only need a task's grader.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from llm2.common.chat import encode_chats, resolve_template
from llm2.common.distributed import barrier, dist_info, iter_shared_work
from llm2.common.inputs import Digests
from llm2.common.journal import Journal
from llm2.common.progress import DecodingBar
from llm2.common.seeds import row_seed
from llm2.config import SamplesConfig, SolutionsConfig
from llm2.errors import UserError
from llm2.exploration.engines import Engine, Request
from llm2.tasks import Problem, Task
from llm2.tasks.grading import Grade

GROUP_BATCHES = 4  # batches of samples that are decoded together; the last rows of a group run in smaller batches


class Sample(NamedTuple):
    """A solution that the model wrote."""

    text: str
    grade: Grade
    tokens: int


def own_solutions(
    config: SolutionsConfig,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    folder: Path,
    inputs: Digests,
) -> tuple[list[Problem], dict[str, int]]:
    """Each problem with each of its own solutions, as `ID/0`, `ID/1` and so on, and their cost.

    Processes share the problems; an interrupted run resumes from the journal in `folder`, which records the run's
    `inputs`. Raises UserError if no sample is right.
    """
    journal = Journal(folder, config, inputs, key=itemgetter("id"), shard=dist_info().rank)
    barrier()  # all processes read the same journal before one adds to it
    waiting = [problem for problem in problems if problem.id not in journal.done]
    size = max(1, GROUP_BATCHES * config.batch_size // config.solution_samples)
    groups = [waiting[start : start + size] for start in range(0, len(waiting), size)]
    with sampling_bar(config, len(waiting)) as bar:
        for index in iter_shared_work(len(groups)):
            for problem, samples in sample_solutions(config, engine, tokenizer, task, groups[index], bar):
                right = dict.fromkeys(sample.text for sample in samples if sample.grade.correct)
                tokens = sum(sample.tokens for sample in samples)
                journal.add({"id": problem.id, "solutions": list(right), "tokens": tokens})
    journal.close()
    barrier()  # every problem is in a shard
    solved, tokens, num_solved = [], 0, 0
    for problem, entry in zip(problems, journal.read([problem.id for problem in problems]), strict=True):
        # A tokenizer may join spaces at the beginning to the end of the prompt.
        kept = list(dict.fromkeys(text.lstrip() for text in entry["solutions"]))[: config.max_solutions]
        solved += [replace(problem, id=f"{problem.id}/{i}", solution=text) for i, text in enumerate(kept)]
        tokens += entry["tokens"]
        num_solved += bool(kept)
    if not solved:
        raise UserError(
            f"solutions: none of {config.solution_samples} samples is right on any of {len(problems)} problems; "
            "expected a System 1 that solves some, or more solution_samples"
        )
    return solved, {
        "sampled_problems": len(problems),
        "solved_problems": num_solved,
        "solutions": len(solved),
        "sampled_tokens": tokens,
    }


def sampling_bar(config: SamplesConfig, problems: int) -> DecodingBar:
    """A bar for the samples of this process; its share of the problems is an estimate (`iter_shared_work`)."""
    samples = math.ceil(problems / dist_info().world_size) * config.solution_samples
    return DecodingBar(samples, config.max_new_tokens, desc="solutions", unit="sample", disable=not dist_info().is_main)


def sample_solutions(
    config: SamplesConfig,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    bar: DecodingBar,
) -> Iterator[tuple[Problem, list[Sample]]]:
    """Yield each problem with `config.solution_samples` graded solutions, in the order in which they finish.

    Sample i depends only on seed, problem and i.
    """
    template = resolve_template(config.chat_template)
    prompts = encode_chats(tokenizer, [task.prompt(problem) for problem in problems], template, generation_prompt=True)
    requests = [
        Request(
            prompt,
            len(prompt),
            (),
            [row_seed(config.seed, problem.id, "solution", i) for i in range(config.solution_samples)],
            problem.id,
        )
        for problem, prompt in zip(problems, prompts, strict=True)
    ]
    for index, completions in engine.stream(deque(requests), bar.on_token):
        bar.on_finished(index, completions)
        problem = problems[index]
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        grades = task.grade(texts, problem.gold)
        yield problem, [Sample(*each) for each in zip(texts, grades, map(len, completions), strict=True)]
