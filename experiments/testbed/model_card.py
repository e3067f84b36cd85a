"""Measure the testbed's System 1 and write its model card."""

import math
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from experiments.testbed.config import PretrainConfig
from experiments.testbed.corpus import MISREADINGS, PARAPHRASED, REORDERED, SKIPPED, SLIP, SWAPPED, WRONG_OPERAND
from llm2.common.chat import encode_chats
from llm2.common.loading import eos_ids
from llm2.common.seeds import row_seed
from llm2.common.stats import majority_curve, pass_at_k
from llm2.decoding.candidates import plausible
from llm2.decoding.decoder import Decoder
from llm2.decoding.sampling import SamplingParams
from llm2.exploration.solutions import TokenizedSolution, tokenize_solutions
from llm2.tasks import Problem, load_task
from llm2.tasks.grading import Grade
from llm2.testbed.generator import stories

SAMPLED_PROBLEMS, SAMPLES = 200, 20
ALPHA = 0.1  # a token is plausible from this share of the top probability
BATCH_SIZE, MAX_NEW_TOKENS = 200, 160


class Measured(NamedTuple):
    """Shares of problems solved."""

    problems: int
    sampled_problems: int  # number of them that are sampled: the first ones
    greedy: float
    unambiguous: float  # greedy, on the problems without a wording that most authors misread
    unambiguous_problems: int
    sampled: float  # mean over samples at temperature 1
    majority: float  # majority@SAMPLES
    passed: float  # pass@SAMPLES
    reachable: float  # every gold token is plausible: what a perfect verifier could reach along gold solutions


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int) -> Measured:
    """Solve the first n validation problems greedily and SAMPLED_PROBLEMS of them by sampling."""
    task = load_task("testbed")
    problems = task.problems("validation", n)
    greedy = [grade.correct for (grade,) in solve(model, tokenizer, problems)]
    unambiguous = [
        correct
        for correct, story in zip(greedy, islice(stories("validation"), n), strict=True)
        if not any(step.phrase in MISREADINGS and MISREADINGS[step.phrase].rate >= 0.5 for step in story.steps)
    ]
    sampled = solve(model, tokenizer, problems[:SAMPLED_PROBLEMS], SAMPLES)
    num_correct = [sum(grade.correct for grade in grades) for grades in sampled]
    majority = [
        majority_curve([grade.answer for grade in grades], problem.gold)[SAMPLES - 1]
        for grades, problem in zip(sampled, problems, strict=False)
    ]
    golds = tokenize_solutions(task, problems, tokenizer, None, eos_ids(model, tokenizer))
    return Measured(
        problems=len(problems),
        sampled_problems=len(sampled),
        greedy=_mean(greedy),
        unambiguous=_mean(unambiguous),
        unambiguous_problems=len(unambiguous),
        sampled=_mean(num_correct) / SAMPLES,
        majority=_mean(majority),
        passed=_mean([pass_at_k(SAMPLES, correct, SAMPLES) for correct in num_correct]),
        reachable=_mean([gold_is_plausible(model, gold) for gold in golds]),
    )


def solve(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], samples: int | None = None
) -> list[list[Grade]]:
    """Each problem's grades: of `samples` solutions at temperature 1, of the greedy one when None."""
    task = load_task("testbed")
    prompts = encode_chats(tokenizer, [task.prompt(problem) for problem in problems], generation_prompt=True)
    solutions = Decoder(model).decode(
        prompts,
        max_new_tokens=MAX_NEW_TOKENS,
        eos=eos_ids(model, tokenizer),
        sampling=SamplingParams() if samples else None,
        seeds=[[row_seed(problem.id, i) for i in range(samples or 1)] for problem in problems],
        batch_size=BATCH_SIZE,
    )
    return [
        task.grade(tokenizer.batch_decode([row.token_ids for row in rows], skip_special_tokens=True), problem.gold)
        for rows, problem in zip(solutions, problems, strict=True)
    ]


@torch.inference_mode()
def gold_is_plausible(model: LlamaForCausalLM, gold: TokenizedSolution) -> bool:
    """Whether System 1 finds each token of the gold solution plausible."""
    ids = torch.tensor([gold.ids[: gold.end]], device=model.device)  # (1, T)
    logits = model(ids).logits[0, gold.start - 1 : -1]  # (T - start, V)
    candidates, valid = plausible(logits, ALPHA)  # (T - start, K)
    return bool(((candidates == ids[0, gold.start :, None]) & valid).any(dim=1).all())


def measured_card(
    config: PretrainConfig, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, loss: float
) -> str:
    measured = measure(model, tokenizer, config.card_problems)
    print(measured, flush=True)
    return card(config, model.num_parameters(), len(tokenizer), loss, measured)


def card(config: PretrainConfig, parameters: int, vocabulary: int, loss: float, measured: Measured) -> str:
    rates = "\n".join(f"| {phrase} | {misreading.rate:.0%} |" for phrase, misreading in MISREADINGS.items())
    layers, width, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    steps = f"{config.max_steps:,} steps of {config.batch_size} conversations"
    return f"""# System 1 of the LLM2 testbed

A Llama of {parameters:,} parameters ({layers} layers, width {width}, {heads} heads, tied embeddings, {vocabulary}
tokens of byte-level BPE, one token per digit), trained from scratch on solutions of grade-school word problems by
careless authors. The right tokens are nearly always plausible to it, but it often prefers wrong ones, so that LLM2's
verifier (System 2) can be studied without a GPU. It has no other use.

- Training: `bash scripts/pretrain_testbed.sh` (transformers Trainer; {steps}, learning rate
  {config.learning_rate:g}, cosine, seed {config.seed}); mean training loss {loss:.3f}, on the assistant's tokens only.
- Data: {config.documents:,} problems of the testbed's `pretrain` split, generated by `llm2/testbed/generator.py`
  and answered by `experiments/testbed/corpus.py`, whose authors misread the wordings below. Of all steps
  {WRONG_OPERAND:.1%} have a wrong operand, {SLIP:.1%} a slip in the result, {SKIPPED:.1%} are skipped. As good as
  gold: {PARAPHRASED:.0%} of steps are paraphrased, {SWAPPED:.0%} of plain sums and products have their operands
  swapped, {REORDERED:.0%} of solutions are in another valid order.
- Chat format: Llama 3's, without a system preamble or a date.

| validation problems | n | share solved |
|---|---|---|
| greedy | {measured.problems} | {measured.greedy:.1%} |
| greedy, without a wording that most authors misread | {measured.unambiguous_problems} | {measured.unambiguous:.1%} |
| one sample, temperature 1 | {measured.sampled_problems} | {measured.sampled:.1%} |
| majority@{SAMPLES}, temperature 1 | {measured.sampled_problems} | {measured.majority:.1%} |
| every gold token plausible (p >= {ALPHA:g} times the top one's) | {measured.problems} | {measured.reachable:.1%} |
| pass@{SAMPLES}, temperature 1 | {measured.sampled_problems} | {measured.passed:.1%} |

The same command measured these figures after training.

| wording | misread by |
|---|---|
{rates}
"""


def _mean(values: list) -> float:
    return sum(values) / len(values) if values else math.nan
