"""Training of the verifier, from a config to a folder: check the data, measure System 1, train, keep the best."""

import json
import logging
import math
import time
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch.utils.data import Subset, random_split
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase
from transformers.integrations import get_reporting_integration_callbacks

from llm2.common.chat import resolve_template
from llm2.common.config_file import write_config
from llm2.common.distributed import dist_info, process_device
from llm2.common.files import whole_files
from llm2.common.inputs import Digests, digests, write_inputs
from llm2.common.loading import load_tokenizer, resolve_device, with_training_dtype
from llm2.common.peak_memory import peak_memory_mib
from llm2.common.training import ForwardsBar, optimizer_arguments
from llm2.config import TrainConfig
from llm2.errors import UserError, as_user_error
from llm2.verifier.arguments import OWN, VerifierTrainingArguments, refuse_options, refuse_steps
from llm2.verifier.checkpoints import begin, last_whole_checkpoint, require_own, stopped_at
from llm2.verifier.model_card import model_card
from llm2.verifier.pair_metrics import pair_info
from llm2.verifier.system1 import measure_system1
from llm2.verifier.trainer import VerifierTrainer
from llm2.verifier.triplets import Example, Summary, load_examples


def train(config: TrainConfig) -> dict:
    """Train a verifier and save it, its metrics (training.json) and its model card; returns the metrics."""
    refuse_options(config.model, config)
    config = with_training_dtype(config)
    device = process_device(resolve_device(config.device))  # every process loads System 1 onto its own GPU
    inputs = digests(config)
    checkpoint = checkpoint_to_resume(config, inputs)
    tokenizer = load_tokenizer(config.model)
    train_set, eval_set, data = load_data(config, tokenizer)
    refuse_steps(config, train_set, eval_set)
    if dist_info().is_main:
        for path, summary in data:
            print(f"{path}: {summary}\n{summary.table()}")
        print(f"{len(train_set)} solutions are trained on, {len(eval_set)} held out", flush=True)
    # System 1 comes before the TrainingArguments: under ZeRO-3 these shard every model that is loaded after them.
    eval_pairs = pair_info(eval_set, tokenizer)
    if not eval_pairs:
        raise UserError(f"{config.train_file}: no held-out pair has a clear winner; raise eval_share, or set eval_file")
    best_by = best_metric(config, eval_set)
    system1 = measure_system1(config.model, config, train_set, eval_set, eval_pairs, device, best_by)

    arguments = training_arguments(config, len(train_set), device, best_by)
    begun = time.perf_counter()
    trainer = VerifierTrainer(
        config.model,
        arguments,
        train_set,
        eval_set,
        tokenizer,
        system1=system1,
        callbacks=[EarlyStoppingCallback(config.early_stopping_patience)] if config.early_stopping_patience else [],
    )
    verifier = trainer.model
    ForwardsBar.of(trainer)
    if dist_info().is_main:
        begin(Path(config.output_dir), config, inputs)
    if checkpoint is not None and (step := stopped_at(checkpoint, config.early_stopping_patience)):
        # No epoch is left to begin; a Trainer that begins one takes a step.
        arguments.num_train_epochs = step // math.ceil(len(train_set) / config.global_batch_size)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    metrics = {
        **trainer.evaluate(),
        **system1.metrics,
        "train_solutions": len(train_set),
        "eval_solutions": len(eval_set),
        "train_seconds": time.perf_counter() - begun,  # of this run, without the time before an interruption
        "peak_memory_mib": peak_memory_mib(device),  # of this process
        "trainable_parameters": verifier.num_parameters(only_trainable=True),
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
    }
    verifier.config.beta = metrics.get("eval_choice_beta")
    is_main, wait = dist_info().is_main, trainer.accelerator.wait_for_everyone
    with whole_files(config.output_dir, is_main) as new:
        wait()  # the folder is there
        trainer.save_model(str(new))  # by all processes, some of which may hold a part of the weights
        if is_main:
            write_config(config, Path(new, "train.yaml"))
            write_inputs(new, inputs)
            Path(new, "training.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
            Path(new, "README.md").write_text(model_card(config, inputs, metrics, data), encoding="utf-8")
        wait()
    if is_main and not verifier.config.is_adapter:  # of an earlier verifier here, which transformers would load
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            Path(config.output_dir, name).unlink(missing_ok=True)
    return metrics


def checkpoint_to_resume(config: TrainConfig, inputs: Digests) -> Path | None:
    """The newest checkpoint in the output folder, if there is one.

    Raises UserError if the folder's checkpoints are not to be resumed, or were made with another config or other data.
    """
    folder = Path(config.output_dir)
    checkpoint = last_whole_checkpoint(folder)
    if checkpoint is None:
        return None
    way_out = f"choose another output_dir, or delete {folder}"
    if not config.resume:
        raise UserError(f"{folder} holds checkpoints and resume is false; {way_out}")
    require_own(folder, config, inputs, way_out)
    return checkpoint


def load_data(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Sequence[Example], Sequence[Example], list[tuple[str, Summary]]]:
    """Checked training and held-out examples, and path and counts of each file."""
    load = partial(
        load_examples,
        tokenizer=tokenizer,
        template=resolve_template(config.chat_template),
        max_length=config.max_length,
        quality=config.quality_weight,
    )
    examples, summary = load(config.train_file, limit=config.limit)
    data = [(config.train_file, summary)]
    data += [(path, load(path, into=examples)[1]) for path in config.further_files]
    if config.eval_file is not None:
        held_out, summary = load(config.eval_file)
        trained_on = {_problem(example) for example in examples}
        if (both := sum(_problem(example) in trained_on for example in held_out)) and dist_info().is_main:
            warning = "%s: the problems of %d of %d solutions are trained on too, so that what is held out is not new"
            logging.getLogger("llm2").warning(warning, config.eval_file, both, len(held_out))
        return examples, held_out, [*data, (config.eval_file, summary)]
    by_prompt: dict[int, list[int]] = {}  # all solutions of a problem are on the same side
    for index, example in enumerate(examples):
        by_prompt.setdefault(_problem(example), []).append(index)
    problems = [*by_prompt.values()]
    count = max(1, round(config.eval_share * len(problems)))
    if count >= len(problems):
        raise UserError(f"{config.train_file}: expected more than {count} problems, so that some can be held out")
    generator = torch.Generator().manual_seed(config.seed)
    parts = random_split(problems, [len(problems) - count, count], generator)
    return *(Subset(examples, [*chain.from_iterable(part)]) for part in parts), data


def _problem(example: Example) -> int:
    return hash(tuple(example.ids[: example.start]))  # the tokens of all prompts would fill memory


def best_metric(config: TrainConfig, eval_set: Sequence[Example]) -> str:
    """The held-out metric that chooses the checkpoint."""
    if config.best_by is not None:
        return config.best_by
    if config.guided_beta is not None:
        return "guided_pair_loss"
    soft = any(example.gold_better and not example.of_steps for example in eval_set)
    return "choice_quality" if soft else "pair_accuracy"


def training_arguments(
    config: TrainConfig, solutions: int, device: torch.device, best_by: str
) -> VerifierTrainingArguments:
    """Args: best_by: the held-out metric that chooses the checkpoint."""
    steps = math.ceil(math.ceil(solutions / config.global_batch_size) * config.num_train_epochs)
    eval_steps = max(1, steps // config.evaluations)
    if config.report_to != "none":
        with as_user_error(f"report_to: found {config.report_to!r}"):
            get_reporting_integration_callbacks([config.report_to])
    return VerifierTrainingArguments(
        **optimizer_arguments(config, device),
        per_device_eval_batch_size=config.per_device_train_batch_size,
        eval_strategy="steps",
        eval_steps=eval_steps,
        save_strategy="steps",
        save_steps=eval_steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,
        metric_for_best_model=best_by,
        greater_is_better=best_by != "guided_pair_loss",
        data_seed=config.seed,
        **{name: getattr(config, name) for name in OWN},
    )
