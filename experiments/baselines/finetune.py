"""Fine-tuning of System 1 on right solutions by transformers' Trainer; the loss is on the solution's tokens only.

On gold solutions it is supervised fine-tuning, on System 1's own right ones rejection-sampling fine-tuning (Yuan et
al., arXiv 2308.01825). The result is a System 1 like any other: evaluate it, or explore it and train its System 2.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from experiments.baselines.config import FinetuneConfig
from experiments.baselines.training import begin, fit, save, trainer_arguments
from llm2.common.chat import resolve_template
from llm2.common.distributed import process_device
from llm2.common.inputs import Digests
from llm2.common.loading import eos_ids, load_system1, load_tokenizer, resolve_device, with_training_dtype
from llm2.exploration.engines import open_engine
from llm2.exploration.own_solutions import own_solutions
from llm2.exploration.solutions import TokenizedSolution, check_template, load_problems, tokenize_solutions
from llm2.tasks import Problem, Task, load_task
from llm2.verifier.loss import IGNORE_INDEX


def finetune(config: FinetuneConfig) -> dict:
    """Write the fine-tuned System 1 to `config.output_dir`; returns counts and the mean training loss."""
    config = with_training_dtype(config)
    inputs = begin(config, "finetune")
    device = process_device(resolve_device(config.device))
    arguments = trainer_arguments(config, device)
    tokenizer, task = load_tokenizer(config.model), load_task(config.task, config.data_file, config.grader)
    replayed = None if config.replay_task is None else load_task(config.replay_task, key="replay_task")
    replayed_problems = load_problems(replayed, config.split, config.limit)[0] if replayed else []
    problems, counts = right_solutions(config, task, tokenizer, inputs)
    model = load_system1(config.model, device, "float32")
    template, eos = resolve_template(config.chat_template), eos_ids(model, tokenizer)
    solutions = tokenize_solutions(task, problems, tokenizer, template, eos)
    task.close()
    if replayed:
        solutions += tokenize_solutions(replayed, replayed_problems, tokenizer, template, eos)
        replayed.close()
    set_seed(config.seed)  # the edit is drawn before the trainer sets the seed itself
    edited = config.output_rank and edit_output_layer(model, config.output_rank)
    trainer = Trainer(
        model,
        TrainingArguments(**arguments),
        data_collator=collator(model),
        train_dataset=Dataset.from_list(examples(solutions)),
    )
    loss = fit(trainer, config, inputs)
    counts["trainable_parameters"] = model.num_parameters(only_trainable=True)
    if edited:
        parametrize.remove_parametrizations(edited, "weight")
    counts |= {"solutions": len(solutions), "training_loss": loss}
    return save(model, tokenizer, config, inputs, "finetune", counts)


class LowRankEdit(nn.Module):
    """W -> W + B A, with B at zero to begin with."""

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.b @ self.a


def edit_output_layer(model: PreTrainedModel, rank: int) -> nn.Module:
    """Leave only a low-rank edit of the output layer to be trained: what a bilinear prefix head of this rank is on the
    plausible set, by the likelihood of solutions. Returns the layer, whose weight no embedding shares any more.
    """
    output = model.get_output_embeddings()
    model.requires_grad_(False)
    output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    parametrize.register_parametrization(output, "weight", LowRankEdit(output.weight, rank).to(output.weight.device))
    return output


def right_solutions(
    config: FinetuneConfig, task: Task, tokenizer: PreTrainedTokenizerBase, inputs: Digests
) -> tuple[list[Problem], dict[str, int]]:
    """The problems with the solutions to train on, and what own ones cost."""
    need_gold = config.solutions == "gold"
    problems, _ = load_problems(task, config.split, config.limit, need_gold)
    check_template(config, tokenizer, task, problems[0])
    if need_gold:
        return problems, {}
    engine = open_engine(config, tokenizer)
    folder = Path(config.output_dir, "solutions")
    problems, counts = own_solutions(config, engine, tokenizer, task, problems, folder, inputs)
    engine.close()
    return problems, counts


def examples(solutions: Sequence[TokenizedSolution]) -> list[dict[str, list[int]]]:
    """Token ids of whole conversations, with the prompt's tokens masked in the labels."""
    return [
        {
            "input_ids": solution.ids[: solution.end],
            "labels": [IGNORE_INDEX] * solution.start + solution.ids[solution.start : solution.end],
        }
        for solution in solutions
    ]


def collator(model: PreTrainedModel) -> Callable[[list[dict[str, list[int]]]], dict[str, Any]]:
    """Batches padded on the left: solutions end together, so that the output layer is read at the last positions only,
    those of the longest solution. TRL's SFTTrainer reads it everywhere on a CPU, and a step of SmolLM2-135M takes 1.3
    times as long (findings/trl_cpu_loss_reads_every_position.sh)."""
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        pad = partial(pad_sequence, batch_first=True, padding_side="left")
        ids, labels = ([torch.tensor(row[key]) for row in rows] for key in ("input_ids", "labels"))
        mask = pad([torch.ones_like(row) for row in ids])
        batch = {"input_ids": pad(ids), "attention_mask": mask}
        if takes_positions:
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        longest = max(int((row != IGNORE_INDEX).sum()) for row in labels)
        keep = longest + 1  # the position before a solution has its first token as its label
        return batch | {"labels": pad(labels, padding_value=IGNORE_INDEX)[:, -keep:], "logits_to_keep": keep}

    return collate
