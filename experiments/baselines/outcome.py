"""A verifier of finished solutions, trained on outcomes by TRL's RewardTrainer (Cobbe et al., arXiv 2110.14168).

System 1 samples solutions of training problems; a right and a wrong one of the same problem make a pair, and the score
of the last token learns to be higher for the right one (Bradley-Terry). The result loads as a verifier: `evaluate` with
modes=[plain_sampling] solution_score=last ranks samples by it, for best of n and weighted votes.
"""

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from experiments.baselines.config import OutcomeConfig
from experiments.baselines.training import begin, fit, save, trainer_arguments
from llm2.common.chat import resolve_template
from llm2.common.loading import (
    eos_ids_by_name,
    is_local,
    load_tokenizer,
    load_whole,
    model_path,
    resolve_device,
    with_training_dtype,
)
from llm2.common.seeds import row_seed
from llm2.errors import UserError
from llm2.exploration.engines import open_engine
from llm2.exploration.own_solutions import Sample, sample_solutions, sampling_bar
from llm2.exploration.solutions import check_template, load_problems, tokenize_solutions
from llm2.tasks import Problem, Task, load_task
from llm2.verifier.model import ProcessVerifier

GROUP = 64  # problems that are sampled together


def train_outcome(config: OutcomeConfig) -> dict:
    """Write the verifier to `config.output_dir`; returns counts and the mean training loss."""
    try:
        import trl  # takes seconds
    except ImportError as error:
        raise UserError(f"this needs TRL ({error}); expected the packages of requirements.txt") from None
    config = with_training_dtype(config)
    inputs = begin(config, "outcome")
    device = resolve_device(config.device)
    arguments = trainer_arguments(config, device)
    tokenizer, task = load_tokenizer(config.model), load_task(config.task, config.data_file, config.grader)
    problems, _ = load_problems(task, config.split, config.limit, need_gold=False)
    check_template(config, tokenizer, task, problems[0])
    sampled = list(sampled_solutions(config, task, problems, tokenizer))
    task.close()
    pairs = [pair for problem, samples in sampled for pair in outcome_pairs(problem, samples, config)]
    if not pairs:
        raise UserError(
            f"no problem of {len(problems)} has a right and a wrong sample; raise solution_samples or limit"
        )
    torch.manual_seed(config.seed)  # of the new head
    where = {"pretrained_model_name_or_path": model_path(config.model), "local_files_only": is_local(config.model)}
    load = partial(AutoModelForSequenceClassification.from_pretrained, **where, num_labels=1, dtype=torch.float32)
    model = load_whole(load, f"model {config.model!r}: its weights", new=("score.weight",))
    template, eos = resolve_template(config.chat_template), eos_ids_by_name(config.model, tokenizer)
    sides = [tokenize_solutions(task, side, tokenizer, template, eos) for side in zip(*pairs, strict=True)]
    rows = [{"chosen_ids": a.ids[: a.end], "rejected_ids": b.ids[: b.end]} for a, b in zip(*sides, strict=True)]
    trainer = trl.RewardTrainer(
        model,
        trl.RewardConfig(**arguments, max_length=None),
        train_dataset=Dataset.from_list(rows),
        processing_class=padding_with_no_text(tokenizer, rows),
    )
    loss = fit(trainer, config, inputs)
    tokens = sum(sample.tokens for _, samples in sampled for sample in samples)
    counts = {"problems": len(problems), "pairs": len(pairs), "sampled_tokens": tokens, "training_loss": loss}
    return save(as_verifier(model, config.model), tokenizer, config, inputs, "outcome", counts)


def sampled_solutions(
    config: OutcomeConfig, task: Task, problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Problem, list[Sample]]]:
    """Each problem with its graded samples."""
    engine = open_engine(config, tokenizer)
    with sampling_bar(config, len(problems)) as bar:
        for start in range(0, len(problems), GROUP):
            group = problems[start : start + GROUP]
            finished = sample_solutions(config, engine, tokenizer, task, group, bar)
            samples = {problem.id: samples for problem, samples in finished}
            yield from ((problem, samples[problem.id]) for problem in group)
    engine.close()


def outcome_pairs(problem: Problem, samples: Sequence[Sample], config: OutcomeConfig) -> list[tuple[Problem, Problem]]:
    """The problem with a right and with a wrong solution: up to max_pairs, none twice, drawn among all of them."""
    right, wrong = (
        [
            replace(problem, solution=text)
            for text in dict.fromkeys(sample.text for sample in samples if sample.grade.correct == correct)
        ]
        for correct in (True, False)
    )
    pairs = list(product(right, wrong))
    random.Random(row_seed(config.seed, problem.id, "pairs")).shuffle(pairs)
    return pairs[: config.max_pairs]


def padding_with_no_text(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Sequence[int]]]
) -> PreTrainedTokenizerBase:
    """A copy that pads with a token which no row has.

    A classifier reads its score at the last token that is not the pad token: where that ends the solutions too, it
    would be the one before.
    """
    used = {token for row in rows for ids in row.values() for token in ids}
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = tokenizer.convert_ids_to_tokens(max(set(range(len(tokenizer))) - used))
    return padded


def as_verifier(model: PreTrainedModel, base_model: str) -> ProcessVerifier:
    """The classifier's backbone and head as a verifier: the score of a solution is that of its last token."""
    verifier = ProcessVerifier.from_backbone(model.base_model, base_model)
    verifier.score.weight = model.score.weight
    return verifier
