"""What the testbed's System 1 can do, measured, and the model card that says so.

Knows what a card tells. Leaves training to pretraining.py, decoding to generation.py, grading to the benchmark's grader
and votes to statistics.py.
"""

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from llm2.common.chat import encode_chats
from llm2.common.loading import eos_ids
from llm2.common.seeds import row_seed
from llm2.common.stats import majority_at_k, pass_at_k
from llm2.config import PretrainConfig
from llm2.decoding.candidates import plausible
from llm2.decoding.decoder import Decoder
from llm2.decoding.sampling import SamplingParams
from llm2.exploration.solutions import TokenizedSolution, tokenize_solutions
from llm2.tasks import Problem, grader_of, load_problems
from llm2.tasks.grading import Grade
from llm2.testbed.generator import stories
from llm2.testbed.stories import Story
from llm2.testbed.train.corpus import MISREADINGS, PARAPHRASED, REORDERED, SKIPPED, SLIP, SWAPPED, WRONG_OPERAND

SAMPLED_PROBLEMS, SAMPLES = 200, 20
ALPHA = 0.1  # a token is plausible from this share of the top probability
BATCH, MOST_NEW_TOKENS = 200, 160
COMMAND = "bash scripts/pretrain_testbed.sh"


class Measured(NamedTuple):
    """Shares of problems solved."""

    problems: int
    sampled_problems: int  # the first so many of them
    greedy: float
    unambiguous: float  # greedy, on the problems whose wordings most authors read rightly
    unambiguous_problems: int
    sampled: float  # mean over samples at temperature 1
    majority: float  # majority@SAMPLES
    passed: float  # pass@SAMPLES
    reachable: float  # every token of gold is plausible: what a perfect verifier could reach on that path alone


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int, split: str = "validation") -> Measured:
    problems = load_problems("testbed", split, n)
    greedy = [grade.correct for (grade,) in solve(model, tokenizer, problems)]
    clean = [
        right for right, story in zip(greedy, islice(stories(split), n), strict=True) if not _misread_by_most(story)
    ]
    sampled = solve(model, tokenizer, problems[:SAMPLED_PROBLEMS], SAMPLES)
    right = [sum(grade.correct for grade in grades) for grades in sampled]
    votes = [[grade.answer for grade in grades] for grades in sampled]
    golds = tokenize_solutions(problems, tokenizer, None, eos_ids(model, tokenizer))
    return Measured(
        problems=len(problems),
        sampled_problems=len(sampled),
        greedy=_mean(greedy),
        unambiguous=_mean(clean),
        unambiguous_problems=len(clean),
        sampled=_mean(right) / SAMPLES,
        majority=_mean([majority_at_k(own, p.gold, SAMPLES) for own, p in zip(votes, problems, strict=False)]),
        passed=_mean([pass_at_k(SAMPLES, count, SAMPLES) for count in right]),
        reachable=_mean([gold_is_plausible(model, gold) for gold in golds]),
    )


def solve(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], samples: int | None = None
) -> list[list[Grade]]:
    """The grades of each problem's solutions: of the greedy one, or of so many at temperature 1."""
    prompts = encode_chats(tokenizer, [problem.prompt for problem in problems], generation_prompt=True)
    rows = Decoder(model).decode(
        prompts,
        max_new_tokens=MOST_NEW_TOKENS,
        eos=eos_ids(model, tokenizer),
        sampling=SamplingParams() if samples else None,
        seeds=[[row_seed(problem.id, i) for i in range(samples or 1)] for problem in problems],
        batch_size=BATCH,
    )
    grader = grader_of("testbed")
    return [
        grader(tokenizer.batch_decode([row.token_ids for row in own], skip_special_tokens=True), problem.gold)
        for own, problem in zip(rows, problems, strict=True)
    ]


@torch.inference_mode()
def gold_is_plausible(model: LlamaForCausalLM, gold: TokenizedSolution) -> bool:
    """Whether System 1 finds each token of the gold solution plausible."""
    ids = torch.tensor([gold.ids[: gold.end]], device=model.device)  # (1, T)
    logits = model(ids).logits[0, gold.start - 1 : -1]  # (T - start, V)
    candidates, valid = plausible(logits, ALPHA)  # (T - start, K)
    return bool(((candidates == ids[0, gold.start :, None]) & valid).any(dim=1).all())


def write_card(
    config: PretrainConfig, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, loss: float
) -> None:
    measured = measure(model, tokenizer, config.card_problems)
    print(measured, flush=True)
    Path(config.output_dir, "README.md").write_text(
        card(config, model.num_parameters(), len(tokenizer), loss, measured)
    )


def card(config: PretrainConfig, parameters: int, vocabulary: int, loss: float, measured: Measured) -> str:
    rates = "\n".join(f"| {phrase} | {misreading.rate:.0%} |" for phrase, misreading in MISREADINGS.items())
    return f"""# System 1 of the LLM2 testbed

A Llama of {parameters:,} parameters ({config.num_hidden_layers} layers, width {config.hidden_size}, {config.num_attention_heads} heads,
tied embeddings, {vocabulary} tokens of byte-level BPE, digits one by one), trained from scratch to solve
grade-school word problems the way careless people do. It proposes the right tokens, but often prefers others:
the object on which LLM2's verifier (System 2) is studied without a GPU. It is of no other use.

- Made by: `{COMMAND}` (transformers Trainer; {config.max_steps:,} steps of {config.batch_size} conversations,
  learning rate {config.learning_rate:g}, cosine, seed {config.seed}); mean training loss {loss:.3f}, on the
  assistant's part alone.
- Data: {config.documents:,} problems of the testbed's `pretrain` split, generated by `llm2/testbed/generator.py`
  and answered by `llm2/testbed/train/corpus.py`, whose authors misread the wordings below. Of all steps
  {WRONG_OPERAND:.1%} hold a wrong operand, {SLIP:.1%} hold a slip, {SKIPPED:.1%} are skipped. As good as gold:
  {PARAPHRASED:.0%} of steps in other words, {SWAPPED:.0%} of plain sums and products turned round,
  {REORDERED:.0%} of solutions in another valid order.
- Chat format: Llama 3's, without a system preamble or a date.

| validation problems | n | share solved |
|---|---|---|
| greedy | {measured.problems} | {measured.greedy:.1%} |
| greedy, no wording that most authors misread | {measured.unambiguous_problems} | {measured.unambiguous:.1%} |
| one sample, temperature 1 | {measured.sampled_problems} | {measured.sampled:.1%} |
| majority@{SAMPLES}, temperature 1 | {measured.sampled_problems} | {measured.majority:.1%} |
| every gold token plausible (p >= {ALPHA:g} of the top) | {measured.problems} | {measured.reachable:.1%} |
| pass@{SAMPLES}, temperature 1 | {measured.sampled_problems} | {measured.passed:.1%} |

Measured at the end of that command, by the same code.

| wording | authors who misread it |
|---|---|
{rates}
"""


def _misread_by_most(story: Story) -> bool:
    return any(step.phrase in MISREADINGS and MISREADINGS[step.phrase].rate >= 0.5 for step in story.steps)


def _mean(values: list) -> float:
    return sum(values) / len(values) if values else math.nan
