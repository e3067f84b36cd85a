"""Training the verifier, from a config to a folder: data checked, System 1 consulted, trained, the best one kept."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.data import Subset, random_split
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainingArguments, set_seed

from llm2.common.chat import resolve_template
from llm2.common.config_file import difference, read_values, write_config
from llm2.common.loading import is_local, load_system1, load_tokenizer, resolve_device
from llm2.config import TrainConfig
from llm2.errors import UserError
from llm2.verifier.checkpoints import last_whole_checkpoint
from llm2.verifier.model import ProcessVerifier, refuse_sliding_window
from llm2.verifier.pair_metrics import Pair, describe, figures, system1_margins
from llm2.verifier.trainer import LossConfig, VerifierTrainer
from llm2.verifier.triplets import Example, ExampleFile, Summary, load_examples

FREE = ("output_dir", "resume", "report_to", "logging_steps")  # may differ between a run and its continuation


def train(config: TrainConfig) -> dict:
    """Check the data, train, keep the best checkpoint; returns the metrics, which also lie in training.json."""
    device = resolve_device(config.device)
    tokenizer = load_tokenizer(config.model)
    train_set, eval_set, notes = load_data(config, tokenizer)
    checkpoint = begin(config)
    if is_main():
        print("\n".join(notes), flush=True)
    # Before the TrainingArguments: under ZeRO-3 these make every model that is loaded later a sharded one.
    pairs = describe(eval_set, tokenizer)
    baseline, unembedding = consult_system1(config, eval_set, pairs, device)

    arguments = training_arguments(config, len(train_set), device)
    set_seed(config.seed)  # the head is drawn before the Trainer sets the seed itself
    verifier = new_verifier(config, device)
    verifier.set_unembedding(unembedding)
    refuse_sliding_window(verifier.backbone.config, max(len(example.ids) for example in [*train_set, *eval_set]))
    refuse_unknown_tokens(verifier, tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(verifier.config, name, getattr(tokenizer, name))  # else the Trainer does it, and warns
    trainer = VerifierTrainer(
        verifier,
        arguments,
        train_set,
        LossConfig(quality_weight=config.quality_weight, margin=config.margin, lm_loss_coef=config.lm_loss_coef),
        pairs,
        eval_dataset=eval_set,
        processing_class=tokenizer,
        callbacks=[]
        if config.early_stopping_patience is None
        else [EarlyStoppingCallback(config.early_stopping_patience)],
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    metrics = {
        **trainer.evaluate(),
        **baseline,
        "train_solutions": len(train_set),
        "eval_solutions": len(eval_set),
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
    }
    trainer.save_model(config.output_dir)
    if is_main():
        Path(config.output_dir, "training.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def is_main() -> bool:
    """Whether this is the one process that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def begin(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, if the folder holds one of the same config; the config is written beside it."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, earlier = last_whole_checkpoint(folder), folder / "train.yaml"
    if checkpoint is not None and not config.resume:
        raise UserError(f"{folder} holds checkpoints and resume is false; choose another output_dir, or delete them")
    if checkpoint is not None and (change := difference(read_values(earlier), config, FREE)):
        raise UserError(
            f"{folder} holds checkpoints of another config: {change}; choose another output_dir, or delete them"
        )
    if is_main():
        write_config(config, earlier)
    return checkpoint


def load_data(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Sequence[Example], Sequence[Example], list[str]]:
    """Checked training and held-out examples, and what a person should read of them."""
    examples, summary = read_file(config, config.train_file, tokenizer)
    notes = [f"{config.train_file}: {summary}", summary.table()]
    if config.eval_file is not None:
        held_out, summary = read_file(config, config.eval_file, tokenizer)
        return examples, held_out, [*notes, f"{config.eval_file}: {summary}", summary.table()]
    count = max(1, round(config.eval_share * len(examples)))
    if count >= len(examples):
        raise UserError(f"{config.train_file}: expected more than {count} solutions, so that some can be held out")
    generator = torch.Generator().manual_seed(config.seed)
    examples, held_out = random_split(examples, [len(examples) - count, count], generator)
    return examples, held_out, [*notes, f"{count} of them are held out, {len(examples)} are trained on"]


def read_file(config: TrainConfig, path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[ExampleFile, Summary]:
    template = resolve_template(config.chat_template)
    return load_examples(path, tokenizer, template, max_length=config.max_length, quality=config.quality_weight)


def new_verifier(config: TrainConfig, device: torch.device) -> ProcessVerifier:
    """In float32, whatever System 1 is stored in: small steps would be lost in 16 bits."""
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
        raise UserError("attention flex_attention: expected a CUDA GPU, since torch trains it nowhere else; use sdpa")
    return ProcessVerifier.from_system1(
        config.model,
        lora=lora,
        dtype=torch.float32,
        local_files_only=is_local(config.model),
        attn_implementation=attention,
    )


def refuse_unknown_tokens(verifier: ProcessVerifier, tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer with added tokens wants a System 1 whose embeddings were resized for them."""
    rows = verifier.backbone.config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} has {len(tokenizer)} tokens and the model embeds {rows}; "
            "expected a model whose embeddings were resized"
        )


def training_arguments(config: TrainConfig, solutions: int, device: torch.device) -> TrainingArguments:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    forward = config.per_device_train_batch_size * ranks
    if config.global_batch_size % forward:
        raise UserError(
            f"global_batch_size {config.global_batch_size}: expected a multiple of per_device_batch_size "
            f"{config.per_device_train_batch_size} x {ranks} processes"
        )
    steps = math.ceil(math.ceil(solutions / config.global_batch_size) * config.num_train_epochs)
    every = max(1, steps // config.evaluations)
    return TrainingArguments(
        output_dir=config.output_dir,
        num_train_epochs=config.num_train_epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_ratio,  # below 1 it is a share of the steps
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.global_batch_size // forward,
        # its name changes with transformers 6, which warns where it is merely passed
        **({"gradient_checkpointing": True} if config.gradient_checkpointing else {}),
        bf16=config.bf16,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="pair_accuracy",
        greater_is_better=True,
        logging_steps=config.logging_steps,
        report_to=config.report_to,
        label_names=["numbers"],
        remove_unused_columns=False,
        ddp_broadcast_buffers=False,  # they are the same everywhere, and the unembedding is large
        use_cpu=device.type == "cpu",
        seed=config.seed,
        data_seed=config.seed,
    )


def consult_system1(
    config: TrainConfig,
    examples: Sequence[Example] | Subset,
    pairs: Mapping[int, Pair],
    device: torch.device,
) -> tuple[dict[str, float], torch.Tensor | None]:
    """System 1's figures on the held-out pairs (on the main rank), and its output embedding where the loss wants it."""
    language = config.lm_loss_coef > 0
    if not is_main() and not language:
        return {}, None
    system1 = load_system1(config.model, device)
    head = system1.get_output_embeddings().weight
    tied = head is system1.get_input_embeddings().weight
    told = figures(system1_margins(system1, examples), pairs) if is_main() else {}
    baseline = {f"system1_{name}": value for name, value in told.items() if not name.startswith("pairs")}
    return baseline, head.detach().float().cpu() if language and not tied else None
