"""What System 1 can do, measured, and the model card that says so.

Knows how to decode problems with plain `generate` and what a card tells. Leaves training to pretraining.py and decoding
with a verifier to llm2/generation.py.
"""

import math
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from llm2.config import PretrainConfig
from llm2.testbed.corpus import MISREADINGS, PARAPHRASED, REORDERED, SKIPPED, SLIP, SWAPPED, WRONG_OPERAND
from llm2.testbed.problems import CONCLUSION, gold_solution, stories
from llm2.testbed.stories import Story

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
    reachable: (
        float  # every token of the gold solution is plausible: what a perfect verifier could reach on that path alone
    )


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int, split: str = "validation") -> Measured:
    problems = list(islice(stories(split), n))
    greedy = [solves(text, story) for text, story in zip(solve(model, tokenizer, problems), problems, strict=True)]
    clean = [right for right, story in zip(greedy, problems, strict=True) if not _misread_by_most(story)]
    sampled = [problem for problem in problems[:SAMPLED_PROBLEMS] for _ in range(SAMPLES)]
    texts = solve(model, tokenizer, sampled, do_sample=True)
    votes = [texts[start : start + SAMPLES] for start in range(0, len(texts), SAMPLES)]
    right = [[solves(text, story) for text in samples] for samples, story in zip(votes, problems, strict=False)]
    return Measured(
        problems=len(problems),
        sampled_problems=len(votes),
        greedy=_mean(greedy),
        unambiguous=_mean(clean),
        unambiguous_problems=len(clean),
        sampled=_mean([_mean(samples) for samples in right]),
        majority=_mean([solves(_majority(samples), story) for samples, story in zip(votes, problems, strict=False)]),
        passed=_mean([any(samples) for samples in right]),
        reachable=_mean([gold_is_plausible(model, tokenizer, story) for story in problems]),
    )


@torch.inference_mode()
def solve(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[Story], do_sample: bool = False
) -> list[str]:
    """One solution a problem, by `generate`: greedy or at temperature 1."""
    choice = {"do_sample": True, "temperature": 1.0, "top_k": 0} if do_sample else {"do_sample": False}
    texts = []
    for start in range(0, len(problems), BATCH):
        prompts = [[{"role": "user", "content": story.question}] for story in problems[start : start + BATCH]]
        inputs = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        ids = model.generate(**inputs, **choice, use_cache=True, max_new_tokens=MOST_NEW_TOKENS)
        texts += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


@torch.inference_mode()
def gold_is_plausible(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, story: Story) -> bool:
    """Whether each token of the gold solution has at least ALPHA times the top probability."""
    prompt = [{"role": "user", "content": story.question}]
    conversation = [*prompt, {"role": "assistant", "content": gold_solution(story)}]
    ids = tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=False).to(model.device)  # (1, T)
    start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
    logits = model(input_ids=ids).logits[0, start - 1 : -1]  # (T - start, V)
    gold = logits.gather(1, ids[0, start:, None])[:, 0]
    return bool((gold >= logits.amax(dim=1) + math.log(ALPHA)).all())


def solves(text: str, story: Story) -> bool:
    return text.endswith(CONCLUSION.format(story.values[-1]))


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

A Llama of {parameters:,} parameters ({config.layers} layers, width {config.hidden_size}, {config.heads} heads,
tied embeddings, {vocabulary} tokens of byte-level BPE, digits one by one), trained from scratch to solve
grade-school word problems the way careless people do. It proposes the right tokens, but often prefers others:
the object on which LLM2's verifier (System 2) is studied without a GPU. It is of no other use.

- Made by: `{COMMAND}` (transformers Trainer; {config.steps:,} steps of {config.batch_size} conversations,
  learning rate {config.learning_rate:g}, cosine, seed {config.seed}); mean training loss {loss:.3f}, on the
  assistant's part alone.
- Data: {config.documents:,} problems of the testbed's `pretrain` split, generated by `llm2/testbed/problems.py`
  and answered by `llm2/testbed/corpus.py`, whose authors misread the wordings below. Of all steps
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


def _majority(texts: list[str]) -> str:
    """A text with the most frequent answer."""
    conclusions = [text.rpartition(". ")[2] for text in texts]
    return Counter(conclusions).most_common(1)[0][0]


def _mean(values: list) -> float:
    return sum(values) / len(values) if values else math.nan
