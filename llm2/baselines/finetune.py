"""Fine-tuning of System 1 on right solutions by TRL's SFTTrainer; the loss is on the solution's tokens only.

On gold solutions it is supervised fine-tuning, on System 1's own right ones rejection-sampling fine-tuning (Yuan et
al., arXiv 2308.01825). The result is a System 1 like any other: evaluate it, or explore it and train its System 2.
"""

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llm2.baselines.training import import_trl, refuse_existing, save, trainer_arguments
from llm2.common.chat import resolve_template
from llm2.common.distributed import process_device
from llm2.common.loading import eos_ids, load_system1, load_tokenizer, resolve_device
from llm2.config import FinetuneConfig
from llm2.exploration.engines import open_engine
from llm2.exploration.own_solutions import own_solutions
from llm2.exploration.solutions import TokenizedSolution, load_problems, tokenize_solutions
from llm2.tasks import Problem, Task, load_task
from llm2.verifier.loss import IGNORE_INDEX


def finetune(config: FinetuneConfig) -> dict:
    """Write the fine-tuned System 1 to `config.output_dir`; returns counts and the mean training loss."""
    trl = import_trl()
    refuse_existing(config, "finetune")
    device = process_device(resolve_device(config.device))
    arguments = trainer_arguments(config, device)
    tokenizer, task = load_tokenizer(config.model), load_task(config.task, config.data_file, config.grader)
    problems, counts = right_solutions(config, task, tokenizer)
    model = load_system1(config.model, device, "float32")
    template, eos = resolve_template(config.chat_template), eos_ids(model, tokenizer)
    solutions = tokenize_solutions(task, problems, tokenizer, template, eos)
    task.close()
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**arguments, max_length=None),
        train_dataset=Dataset.from_list(examples(solutions)),
        processing_class=tokenizer,
    )
    loss = trainer.train().training_loss
    counts |= {"solutions": len(solutions), "training_loss": loss}
    return save(model, tokenizer, config, "finetune", counts)


def right_solutions(
    config: FinetuneConfig, task: Task, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Problem], dict[str, int]]:
    """The problems with the solutions to train on, and what own ones cost."""
    need_gold = config.solutions == "gold"
    problems, _ = load_problems(task, config.split, config.limit, need_gold)
    if need_gold:
        return problems, {}
    engine = open_engine(config, tokenizer)
    folder = Path(config.output_dir, "solutions")
    problems, counts = own_solutions(config, engine, tokenizer, task, problems, folder)
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
