"""VerifierTrainer: a transformers Trainer whose loss is the mean over real pairs, however they are batched.

Knows the loss, the batch and the order of the examples. Which data, which model and which settings, `training` says.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import EvalPrediction, Trainer, TrainingArguments

from llm2.verifier.collate import verifier_batch
from llm2.verifier.lora import load_adapter
from llm2.verifier.loss import IGNORE_INDEX, NO_PAIR, pairwise_loss
from llm2.verifier.model import ProcessVerifier, VerifierOutput
from llm2.verifier.packing import BLOCK
from llm2.verifier.pair_metrics import Pair, figures
from llm2.verifier.triplets import Example

NOTHING = Example([0], [])  # has no pair: takes part in a forward and in no loss


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is added to the mean over pairs; nothing by default."""

    quality_weight: bool = False
    margin: float = 0.0
    lm_loss_coef: float = 0.0


class PaddedSampler(Sampler[int]):
    """The examples of an epoch in an order of seed and epoch, then indices beyond them until the last step is whole.

    So no rank is ever without a batch, and no example counts twice because ranks want batches of the same size.
    """

    def __init__(self, examples: int, step: int, seed: int) -> None:
        self.examples, self.step, self.seed, self.epoch = examples, step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.examples // self.step) * self.step

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.examples, generator=generator).tolist()
        yield from range(self.examples, len(self))


class PaddedDataset(Dataset):
    """Examples, and NOTHING beyond them."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index] if index < len(self.examples) else NOTHING


class VerifierTrainer(Trainer):
    """Trains a ProcessVerifier on `Example`s. Everything that is not the loss and the batch is the Trainer's own.

    Args:
        loss: what is added to the mean over pairs.
        pairs: the held-out pairs by number; with it the evaluation tells `pairs.figures`.
    """

    def __init__(
        self,
        model: ProcessVerifier,
        args: TrainingArguments,
        train_dataset: Sequence[Example],
        loss: LossConfig | None = None,
        pairs: Mapping[int, Pair] | None = None,
        **options: Any,
    ) -> None:
        self.loss = loss or LossConfig()
        super().__init__(
            model=model,
            args=args,
            train_dataset=PaddedDataset(train_dataset),
            data_collator=self.collate,
            compute_loss_func=self.loss_of_output,
            compute_metrics=None if pairs is None else lambda prediction: pair_metrics(prediction, pairs),
            **options,
        )

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """On FlexAttention one row holds all, since it skips what a token cannot see; else rows are kept short."""
        flex = self.model.backbone.config._attn_implementation == "flex_attention"
        batch = verifier_batch(
            examples,
            capacity=sys.maxsize if flex else None,
            multiple=BLOCK if flex else 1,
            quality_weight=self.loss.quality_weight,
            language=self.loss.lm_loss_coef > 0,
        )
        return {name: tensor for name, tensor in batch._asdict().items() if tensor is not None}

    def compute_loss(self, model, inputs, *arguments, **options):
        """The model has no use for the numbers of the pairs."""
        inputs = {name: tensor for name, tensor in inputs.items() if name != "numbers"}
        return super().compute_loss(model, inputs, *arguments, **options)

    def loss_of_output(
        self, output: VerifierOutput, labels: torch.Tensor, num_items_in_batch: torch.Tensor
    ) -> torch.Tensor:
        pairs, tokens = num_items_in_batch
        loss = pairwise_loss(output.margins, labels, pairs, self.loss.margin)
        if self.loss.lm_loss_coef > 0:
            loss = loss + self.loss.lm_loss_coef * output.lm_loss.sum() / tokens.clamp(min=1)
        return loss

    def _get_num_items_in_batch(self, batch_samples: Sequence[dict], device: torch.device) -> torch.Tensor:
        """Of a whole optimizer step, over accumulation and ranks: the pairs' weights, and the tokens to foretell."""
        pairs = sum(batch["labels"].sum().item() for batch in batch_samples)
        tokens = sum((batch["targets"] != IGNORE_INDEX).sum().item() for batch in batch_samples if "targets" in batch)
        return self.accelerator.reduce(torch.tensor([pairs, tokens], device=device), reduction="sum")

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return PaddedSampler(len(self.train_dataset), step, self.args.seed)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Of the outputs only the margins are kept."""
        keys = ["scores", "lm_loss", "past_key_values"]
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=keys)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.model.config.lora is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_adapter(resume_from_checkpoint, self.model)

    def _load_best_model(self) -> None:
        if self.model.config.lora is None or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            load_adapter(self.state.best_model_checkpoint, self.model)


def pair_metrics(prediction: EvalPrediction, pairs: Mapping[int, Pair]) -> dict[str, float]:
    """Over all held-out pairs at once, each counted once, so that neither batches nor ranks weigh in."""
    real = prediction.label_ids != NO_PAIR
    margins = zip(prediction.label_ids[real].tolist(), prediction.predictions[real].tolist(), strict=True)
    return figures(dict(margins), pairs)
