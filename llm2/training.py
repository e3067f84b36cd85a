"""Training the verifier: a transformers Trainer whose loss is the mean over real pairs, however they are batched."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Subset, random_split
from tqdm import tqdm
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from llm2.batch import verifier_batch
from llm2.branches import mask_for
from llm2.chat import resolve_template
from llm2.config import TrainConfig, difference, read_values, write_config
from llm2.errors import UserError
from llm2.loss import NO_PAIR, pair_accuracy, pairwise_loss
from llm2.models import is_local, load_system1, load_tokenizer, pick_device
from llm2.statistics import wilson_interval
from llm2.triplets import Example, load_examples
from llm2.verifier import ProcessVerifier, VerifierOutput, refuse_sliding_window

FREE = ("output_dir", "resume", "report_to", "logging_steps")  # may differ between a run and its continuation


class VerifierTrainer(Trainer):
    """Trains a ProcessVerifier on `Example`s. Everything that is not the loss and the batch is the Trainer's own."""

    def __init__(self, model: ProcessVerifier, args: TrainingArguments, **options) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=self.collate,
            compute_loss_func=_loss_of_output,
            compute_metrics=pair_metrics,
            **options,
        )

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        batch = verifier_batch(examples)
        return batch._replace(attention_mask=mask_for(self.model, batch.attention_mask))._asdict()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Of the outputs only the margins are kept: scores differ in width from batch to batch."""
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=["scores", "past_key_values"])


def _loss_of_output(
    output: VerifierOutput, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    return pairwise_loss(output.margins, labels, num_items_in_batch)


def pair_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Over all held-out pairs at once, so that neither batches nor ranks weigh in."""
    real = prediction.label_ids != NO_PAIR
    margins = torch.as_tensor(prediction.predictions[real])
    low, high = wilson_interval(round(pair_accuracy(margins) * len(margins)), len(margins))
    return {
        "pair_accuracy": pair_accuracy(margins),
        "pair_accuracy_low": low,
        "pair_accuracy_high": high,
        "pair_loss": pairwise_loss(margins, torch.ones_like(margins)).item(),
        "mean_margin": margins.mean().item(),
        "pairs": len(margins),
    }


def train(config: TrainConfig) -> dict:
    """Check the data, train, keep the best checkpoint; returns the metrics, which also lie in training.json."""
    device = pick_device(config.device)
    tokenizer = load_tokenizer(config.model)
    train_set, eval_set, data = load_data(config, tokenizer)
    main = os.environ.get("RANK", "0") == "0"
    checkpoint = begin(config, main)
    if main:
        print("\n".join(data), flush=True)
    # Before the TrainingArguments: under ZeRO-3 these make every model that is loaded later a sharded one.
    system1 = system1_pair_accuracy(config, eval_set, device) if main else math.nan

    arguments = training_arguments(config, len(train_set))
    set_seed(config.seed)  # the head is drawn before the Trainer sets the seed itself
    verifier = ProcessVerifier.from_system1(config.model, dtype=torch.float32, local_files_only=is_local(config.model))
    refuse_sliding_window(verifier.backbone.config, max(len(example.ids) for example in [*train_set, *eval_set]))
    trainer = VerifierTrainer(
        verifier, arguments, train_dataset=train_set, eval_dataset=eval_set, processing_class=tokenizer
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = {
        **trainer.evaluate(),
        "system1_pair_accuracy": system1,
        "train_solutions": len(train_set),
        "eval_solutions": len(eval_set),
        "steps": trainer.state.global_step,
    }
    trainer.save_model(config.output_dir)
    if main:
        tokenizer.save_pretrained(config.output_dir)
        Path(config.output_dir, "training.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def begin(config: TrainConfig, main: bool) -> str | None:
    """The checkpoint to go on from, if the folder holds one of the same config; the config is written beside it."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, earlier = get_last_checkpoint(folder), folder / "train.yaml"
    if checkpoint is not None and not config.resume:
        raise UserError(f"{folder} holds checkpoints and resume is false; choose another output_dir, or delete them")
    if checkpoint is not None and (change := difference(read_values(earlier), config, FREE)):
        raise UserError(
            f"{folder} holds checkpoints of another config: {change}; choose another output_dir, or delete them"
        )
    if main:
        write_config(config, earlier)
    return checkpoint


def load_data(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Sequence[Example], Sequence[Example], list[str]]:
    """Checked training and held-out examples, and what a person should read of them."""
    template = resolve_template(config.chat_template)
    examples, summary = load_examples(config.train_file, tokenizer, template)
    notes = [f"{config.train_file}: {summary}"]
    examples, dropped = truncate(examples, config.max_length)
    if config.eval_file is not None:
        held_out, summary = load_examples(config.eval_file, tokenizer, template)
        notes.append(f"{config.eval_file}: {summary}")
        held_out, dropped_too = truncate(held_out, config.max_length)
        dropped += dropped_too
    else:
        count = max(1, round(config.eval_share * len(examples)))
        if count >= len(examples):
            raise UserError(f"{config.train_file}: expected more than {count} solutions, so that some can be held out")
        generator = torch.Generator().manual_seed(config.seed)
        examples, held_out = random_split(examples, [len(examples) - count, count], generator)
        notes.append(f"{count} of them are held out, {len(examples)} are trained on")
    if dropped:
        notes.append(f"{dropped} triplets at or beyond max_length {config.max_length} are dropped")
    return examples, held_out, notes


def truncate(examples: Sequence[Example], max_length: int) -> tuple[list[Example], int]:
    """Cut to max_length tokens; a pair beyond the cut goes, and so does a solution without pairs. Counts the pairs."""
    cut = [Example(ids[:max_length], [t for t in pairs if t.position < max_length]) for ids, pairs in examples]
    dropped = sum(len(old.triplets) - len(new.triplets) for old, new in zip(examples, cut, strict=True))
    return [example for example in cut if example.triplets], dropped


def training_arguments(config: TrainConfig, solutions: int) -> TrainingArguments:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    forward = config.per_device_batch_size * ranks
    if config.global_batch_size % forward:
        raise UserError(
            f"global_batch_size {config.global_batch_size}: expected a multiple of per_device_batch_size "
            f"{config.per_device_batch_size} x {ranks} processes"
        )
    steps = math.ceil(math.ceil(solutions / config.global_batch_size) * config.epochs)
    every = max(1, steps // config.evaluations)
    return TrainingArguments(
        output_dir=config.output_dir,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup,  # below 1 it is a share of the steps
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        per_device_train_batch_size=config.per_device_batch_size,
        per_device_eval_batch_size=config.per_device_batch_size,
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
        label_names=["labels"],
        remove_unused_columns=False,
        use_cpu=config.device == "cpu",
        seed=config.seed,
        data_seed=config.seed,
    )


@torch.inference_mode()
def system1_pair_accuracy(config: TrainConfig, examples: Sequence[Example] | Subset, device: torch.device) -> float:
    """The baseline that the verifier has to beat: how often System 1's own probability prefers gold."""
    model = load_system1(config.model, device)
    margins = []
    for example in tqdm(examples, desc="System 1 on the held-out pairs", unit="solution"):
        logits = model(torch.tensor([example.ids], device=device), use_cache=False).logits[0]
        position, gold, negative = torch.tensor(example.triplets, device=device).unbind(-1)
        margins.append(logits[position - 1, gold] - logits[position - 1, negative])
    return pair_accuracy(torch.cat(margins).float())
