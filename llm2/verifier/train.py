"""Training of the verifier, from a config to a folder: check the data, measure System 1, train, keep the best."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import random_split
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks

from llm2.common.architecture import examine, refuse_too_long
from llm2.common.chat import resolve_template
from llm2.common.config_file import write_config
from llm2.common.distributed import dist_info, process_device
from llm2.common.files import whole_files
from llm2.common.inputs import Digests, digests, write_inputs
from llm2.common.loading import changes_logits, load_config, load_system1, load_tokenizer, resolve_device
from llm2.common.memory import peak_memory_mib
from llm2.common.training import ForwardsBar, optimizer_arguments
from llm2.config import TrainConfig
from llm2.errors import UserError, explained
from llm2.verifier.checkpoints import begin, last_whole_checkpoint, require_own
from llm2.verifier.frozen_states import FrozenStates
from llm2.verifier.model import ProcessVerifier
from llm2.verifier.model_card import model_card
from llm2.verifier.pair_metrics import (
    PairInfo,
    WithSystem1Margins,
    compute_metrics,
    fork_rivals,
    pair_info,
    system1_margins,
)
from llm2.verifier.trainer import LossConfig, VerifierTrainer
from llm2.verifier.triplets import Example, Summary, load_examples

READ_BATCH = 16  # solutions of a forward that reads frozen states


def train(config: TrainConfig) -> dict:
    """Train a verifier and save it, its metrics (training.json) and its model card; returns the metrics."""
    refuse_options(config)
    device = process_device(resolve_device(config.device))  # every process loads System 1 onto its own GPU
    if config.lm_loss_coef > 0 and (key := changes_logits(load_config(config.model))) is not None:
        raise UserError(f"lm_loss_coef: {config.model} has {key}, by which its loss would be another one; expected 0")
    inputs = digests(config)
    checkpoint = checkpoint_to_resume(config, inputs)
    tokenizer = load_tokenizer(config.model)
    train_set, eval_set, data = load_data(config, tokenizer)
    tokenizer.chat_template = resolve_template(config.chat_template) or tokenizer.chat_template  # saved, too
    if dist_info().is_main:
        for path, summary in data:
            print(f"{path}: {summary}\n{summary.table()}")
        print(f"{len(train_set)} solutions are trained on, {len(eval_set)} held out", flush=True)
    # System 1 comes before the TrainingArguments: under ZeRO-3 these shard every model that is loaded after them.
    eval_pairs = pair_info(eval_set, tokenizer)
    if not eval_pairs:
        raise UserError(f"{config.train_file}: no held-out pair has a clear winner; raise eval_share, or set eval_file")
    best_by = best_metric(config, eval_set)
    system1 = measure_system1(config, train_set, eval_set, eval_pairs, device, best_by)

    arguments = training_arguments(config, len(train_set), device, best_by)
    set_seed(config.seed)  # the head is drawn before the Trainer sets the seed itself
    verifier = new_verifier(config, device)
    verifier.set_unembedding(system1.unembedding)
    verifier.dropout.p = config.dropout
    refuse_long_solutions(verifier.backbone, max(len(example.ids) for example in [*train_set, *eval_set]))
    refuse_unknown_tokens(verifier, tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(verifier.config, name, getattr(tokenizer, name))  # otherwise the Trainer does it, and warns
    begun = time.perf_counter()
    train_data, eval_data = train_set, eval_set
    if config.guided_beta is not None:
        train_data = WithSystem1Margins(train_set, system1.train_margins)
        eval_data = WithSystem1Margins(eval_set, system1.eval_margins)
    if config.prefix_head is not None:
        verifier.to(device)
        train_data, eval_data = (FrozenStates(verifier, data, READ_BATCH) for data in (train_data, eval_data))
    trainer = VerifierTrainer(
        verifier,
        arguments,
        train_data,
        LossConfig(**{field.name: getattr(config, field.name) for field in fields(LossConfig)}),
        eval_pairs,
        fork_rivals(eval_set, system1.eval_margins) if system1.eval_margins else (),
        system1.eval_margins,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        callbacks=[EarlyStoppingCallback(config.early_stopping_patience)] if config.early_stopping_patience else [],
    )
    ForwardsBar.of(trainer)
    if dist_info().is_main:
        begin(Path(config.output_dir), config, inputs)
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
        return examples, held_out, [*data, (config.eval_file, summary)]
    count = max(1, round(config.eval_share * len(examples)))
    if count >= len(examples):
        raise UserError(f"{config.train_file}: expected more than {count} solutions, so that some can be held out")
    generator = torch.Generator().manual_seed(config.seed)
    return *random_split(examples, [len(examples) - count, count], generator), data


def refuse_options(config: TrainConfig) -> None:
    """Raise UserError for keys that exclude each other, before anything slow."""
    for key in ("prefix_head", "token_weight"):
        if getattr(config, key) and config.score == "candidate":
            raise UserError(f"{key}: expected score: prefix, found score: candidate")
    for key in ("lora_r", "lm_loss_coef"):
        if config.prefix_head and getattr(config, key):
            raise UserError(f"prefix_head: a head on frozen states has no weights for {key}; leave one of the two out")


def best_metric(config: TrainConfig, eval_set: Sequence[Example]) -> str:
    """The held-out metric that chooses the checkpoint."""
    if config.best_by is not None:
        return config.best_by
    if config.guided_beta is not None:
        return "guided_pair_loss"
    return "choice_quality" if any(example.gold_better for example in eval_set) else "pair_accuracy"


def new_verifier(config: TrainConfig, device: torch.device) -> ProcessVerifier:
    """In float32, whatever System 1 is stored in: 16 bits would lose small updates."""
    lora = config.lora_r and {
        "rank": config.lora_r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "targets": config.lora_target_modules,
    }
    attention = config.attn_implementation
    if attention == "auto":
        attention = "flex_attention" if device.type == "cuda" else "sdpa"
    if attention == "flex_attention" and device.type != "cuda":
        raise UserError(
            "attn_implementation flex_attention: expected a CUDA GPU, since torch trains it nowhere else; use sdpa"
        )
    weight = {"token_weight": True} if config.token_weight else {}
    head = config.prefix_head and {"kind": config.prefix_head, "size": config.prefix_head_size, **weight}
    options = {"dtype": torch.float32, "attn_implementation": attention, **({} if head else weight)}
    verifier = ProcessVerifier.from_system1(config.model, lora, config.score, head, **options)
    if config.trainable_layers is not None:
        freeze_layers(verifier, config.trainable_layers)
    return verifier


def freeze_layers(verifier: ProcessVerifier, trainable: int) -> None:
    """Leave only the head and the `trainable` highest layers to be trained."""
    backbone, count = verifier.backbone, verifier.backbone.config.get_text_config().num_hidden_layers
    if trainable > count:
        raise UserError(f"trainable_layers: found {trainable}, expected at most the {count} of {backbone.name_or_path}")
    layers = next(m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    backbone.requires_grad_(False)
    layers[count - trainable :].requires_grad_(True)


def refuse_long_solutions(backbone: PreTrainedModel, length: int) -> None:
    """Raise UserError if the backbone has too few positions for `length` tokens, or a shorter window: with branch masks
    a token sees its whole prefix, so its scores would not be those of the backbone's own attention."""
    window = examine(type(backbone), backbone.config).window
    if window is not None and length > window:
        raise UserError(
            f"the backbone attends to a sliding window of {window} tokens, shorter than the {length} of prompt "
            f"and solution; keep them within {window} tokens"
        )
    refuse_too_long(backbone.config, length, "the longest solution")


def refuse_unknown_tokens(verifier: ProcessVerifier, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if the tokenizer has added tokens that System 1 does not embed."""
    rows = verifier.backbone.config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} has {len(tokenizer)} tokens and the model embeds {rows}; "
            "expected a model whose embeddings were resized"
        )


def training_arguments(config: TrainConfig, solutions: int, device: torch.device, best_by: str) -> TrainingArguments:
    """Args: best_by: the held-out metric that chooses the checkpoint."""
    steps = math.ceil(math.ceil(solutions / config.global_batch_size) * config.num_train_epochs)
    eval_steps = max(1, steps // config.evaluations)
    if config.report_to != "none":
        with explained(f"report_to: found {config.report_to!r}"):
            get_reporting_integration_callbacks([config.report_to])
    arguments = TrainingArguments(
        **optimizer_arguments(config, device),
        per_device_eval_batch_size=config.per_device_train_batch_size,
        eval_strategy="steps",
        eval_steps=eval_steps,
        save_strategy="steps",
        save_steps=eval_steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=best_by,
        greater_is_better=best_by != "guided_pair_loss",
        label_names=["pair_ids"],
        logging_nan_inf_filter=False,  # it would hide what VerifierTrainer.log refuses
        remove_unused_columns=False,
        ddp_broadcast_buffers=False,  # every process loads the same unembedding, and it is large
        data_seed=config.seed,
    )
    if arguments.n_gpu > 1:  # the Trainer would wrap the model in DataParallel
        raise UserError(
            f"one process sees {arguments.n_gpu} GPUs, and the batch would be multiplied by them; expected one process "
            "for each (bash scripts/train_verifier.sh), or one GPU in CUDA_VISIBLE_DEVICES"
        )
    return arguments


class System1Measures(NamedTuple):
    """What training takes from System 1 before it loads the verifier."""

    metrics: dict[str, float]  # on the held-out pairs
    eval_margins: dict[int, float]  # of `system1_margins`; empty where this process does not need them
    train_margins: dict[int, float]  # the same; empty but for guided_beta
    unembedding: torch.Tensor | None  # (V, D); None without LM loss, or where it is tied to the input embedding


def measure_system1(
    config: TrainConfig,
    train_set: Sequence[Example],
    eval_set: Sequence[Example],
    pairs: Mapping[int, PairInfo],
    device: torch.device,
    best_by: str,
) -> System1Measures:
    """The main process reports the metrics; the others measure only what loss or choice of a checkpoint need."""
    is_main, lm_loss, guided = dist_info().is_main, config.lm_loss_coef > 0, config.guided_beta is not None
    measured = is_main or guided or best_by != "pair_accuracy"
    if not measured and not lm_loss:
        return System1Measures({}, {}, {}, None)
    system1 = load_system1(config.model, device)
    head = system1.get_output_embeddings().weight
    tied = head is system1.get_input_embeddings().weight
    margins = system1_margins(system1, eval_set) if measured else {}
    return System1Measures(
        {
            f"system1_{name}": value
            for name, value in (compute_metrics(margins, pairs) if is_main else {}).items()
            if not name.startswith("pairs")
        },
        margins,
        system1_margins(system1, train_set) if guided else {},
        head.detach().float().cpu() if lm_loss and not tied else None,
    )
