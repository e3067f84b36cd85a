"""VerifierTrainer: a transformers Trainer whose loss is the mean over the pairs of a whole optimizer step."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from llm2.errors import UserError
from llm2.verifier.checkpoints import PathsWithoutHome
from llm2.verifier.collate import verifier_batch
from llm2.verifier.frozen_states import FrozenExample, FrozenStates, frozen_batch
from llm2.verifier.loss import IGNORE_INDEX, NO_PAIR, pairwise_loss
from llm2.verifier.masks import BLOCK
from llm2.verifier.model import ProcessVerifier
from llm2.verifier.pair_metrics import PairInfo, Rival, choice_metrics, compute_metrics, guided_metrics
from llm2.verifier.triplets import EMPTY_EXAMPLE, Example

ALL_FINITE = torch.iinfo(torch.long).max  # in place of the id of a pair whose margin is not finite
NOT_FOR_THE_MODEL = ("pair_ids", "pair_weights", "pair_targets", "pair_offsets")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Options of the loss; the defaults give the plain mean over pairs."""

    quality_weight: bool = False
    guided_beta: float | None = None  # the examples then have System 1's margins
    label_smoothing: float = 0.0
    margin: float = 0.0
    lm_loss_coef: float = 0.0


class PaddedSampler(Sampler[int]):
    """The examples of an epoch, shuffled by seed and epoch, then indices beyond them until the last step is full.

    So every rank gets as many batches, and no example is repeated to fill the last one. Where epochs are no whole
    number, the last one ends after a part of them: a Trainer that resumes after its last step would go on.
    """

    def __init__(self, num_examples: int, step_size: int, seed: int, num_epochs: float) -> None:
        self.num_examples, self.step_size, self.seed, self.num_epochs = num_examples, step_size, seed, num_epochs
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_examples // self.step_size) * self.step_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_examples, generator=generator).tolist()
        steps = len(self) // self.step_size
        left = max(0, math.ceil(self.num_epochs * steps) - self.epoch * steps)
        yield from [*order, *range(self.num_examples, len(self))][: left * self.step_size]


class PaddedDataset(Dataset):
    """The examples, and an empty one at every index beyond them."""

    def __init__(self, examples: Sequence[Example] | FrozenStates) -> None:
        self.examples = examples
        self.empty = examples.empty if isinstance(examples, FrozenStates) else EMPTY_EXAMPLE

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example | FrozenExample:
        return self.examples[index] if index < len(self.examples) else self.empty


class VerifierTrainer(Trainer):
    """Trains a ProcessVerifier on `Example`s, a prefix head on `FrozenStates`.

    The TrainingArguments need label_names=["pair_ids"] and remove_unused_columns=False.

    Args:
        loss: options of the loss.
        eval_pairs: the held-out pairs by id; an evaluation then reports `compute_metrics`.
        eval_forks: their forks; it then reports `choice_metrics` too.
        eval_system1: System 1's margins of these pairs; it then reports `guided_metrics` too.
    """

    def __init__(
        self,
        model: ProcessVerifier,
        args: TrainingArguments,
        train_dataset: Sequence[Example] | FrozenStates,
        loss: LossConfig | None = None,
        eval_pairs: Mapping[int, PairInfo] | None = None,
        eval_forks: Sequence[Sequence[Rival]] = (),
        eval_system1: Mapping[int, float] | None = None,
        **options: Any,
    ) -> None:
        self.loss, self._first_bad = loss or LossConfig(), ALL_FINITE

        def metrics(prediction: EvalPrediction) -> dict[str, float]:
            """Over all held-out pairs at once, so that batches and ranks have no weight."""
            real = prediction.label_ids != NO_PAIR
            ids, margins = (array[real].tolist() for array in (prediction.label_ids, prediction.predictions))
            by_id = dict(zip(ids, margins, strict=True))
            if bad := [pair_id for pair_id, margin in by_id.items() if not math.isfinite(margin)]:
                self._refuse(min(bad))
            found = compute_metrics(by_id, eval_pairs)
            found |= choice_metrics(eval_forks, by_id) if eval_forks else {}
            return found | (guided_metrics(by_id, eval_pairs, eval_system1) if eval_system1 else {})

        super().__init__(
            model=model,
            args=args,
            train_dataset=PaddedDataset(train_dataset),
            data_collator=self.collate,
            compute_metrics=None if eval_pairs is None else metrics,
            **options,
        )
        self.add_callback(PathsWithoutHome())
        # compute_loss divides by the pairs of the whole step: the Trainer must not divide by accumulation steps again.
        self.model_accepts_loss_kwargs = True

    def collate(self, examples: Sequence[Example] | Sequence[FrozenExample]) -> dict[str, torch.Tensor]:
        """FlexAttention skips what a token cannot see, so one row holds all solutions; otherwise rows are short."""
        if isinstance(examples[0], FrozenExample):
            batch = frozen_batch(examples, self.loss.quality_weight)
        else:
            flex = self.model.uses_flex_attention
            batch = verifier_batch(
                examples,
                branches=self.model.config.score == "candidate",
                capacity=sys.maxsize if flex else None,
                multiple=BLOCK if flex else 1,
                quality_weight=self.loss.quality_weight,
                lm_targets=self.loss.lm_loss_coef > 0,
            )
        return {name: tensor for name, tensor in batch._asdict().items() if tensor is not None}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**{name: tensor for name, tensor in inputs.items() if name not in NOT_FOR_THE_MODEL})
        total_weight, num_targets = num_items_in_batch
        weights, targets, margins = inputs["pair_weights"], inputs["pair_targets"], output.margins
        if self.loss.guided_beta is not None:
            margins = inputs["pair_offsets"] + self.loss.guided_beta * margins
        targets = targets + self.loss.label_smoothing * (0.5 - targets)
        loss = pairwise_loss(margins, weights, total_weight, self.loss.margin, targets)
        if self.loss.lm_loss_coef > 0:
            loss = loss + self.loss.lm_loss_coef * output.lm_loss.sum() / num_targets.clamp(min=1)
        if model.training:  # noted on the device, read only in an error: nothing waits for it
            ids = torch.where(output.margins.isfinite(), ALL_FINITE, inputs["pair_ids"]).flatten()
            lowest = torch.cat([ids, ids.new_full((1,), ALL_FINITE)]).amin()
            before = torch.as_tensor(self._first_bad, device=ids.device)
            self._first_bad = torch.where(before == ALL_FINITE, lowest, before)
        loss = loss * self.accelerator.num_processes  # over which gradients are averaged
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], *arguments, **options) -> None:
        if not math.isfinite(logs.get("loss", 0.0)):
            self._refuse()
        super().log(logs, *arguments, **options)

    def _refuse(self, held_out: int = ALL_FINITE) -> None:
        """Raise UserError that names the first pair without a finite margin: trained on, or else the one held out."""
        which, examples, pair_id = "trained on", self.train_dataset.examples, int(self._first_bad)
        if pair_id == ALL_FINITE:
            which, examples, pair_id = "held out", self.eval_dataset, held_out
        where = f"step {self.state.global_step}"
        for example in examples.examples if isinstance(examples, FrozenStates) else examples:
            if 0 <= pair_id - example.first_pair_id < len(example.triplets):
                position = example.triplets[pair_id - example.first_pair_id].position
                where += f", line {example.line} of the solutions that are {which}, position {position}"
        raise UserError(
            f"{where}: the verifier's score or the loss is NaN or infinite, expected finite numbers; a lower "
            "learning_rate, or bf16=false, may do"
        )

    def _get_num_items_in_batch(self, batch_samples: Sequence[dict], device: torch.device) -> torch.Tensor:
        """(2,) over accumulation and ranks: the sum of the pair weights, and the number of LM targets."""
        weight = sum(batch["pair_weights"].sum().item() for batch in batch_samples)
        targets = sum((batch["targets"] != IGNORE_INDEX).sum().item() for batch in batch_samples if "targets" in batch)
        return self.accelerator.reduce(torch.tensor([weight, targets], device=device), reduction="sum")

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        step_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return PaddedSampler(len(self.train_dataset), step_size, self.args.seed, self.args.num_train_epochs)

    def save_model(self, output_dir: str | None = None, **options: Any) -> None:
        """Without the Trainer's own pickle of its arguments, which holds absolute paths and which nothing reads."""
        super().save_model(output_dir, **options)
        if self.args.should_save:
            Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    # The Trainer looks for all weights, or for an adapter in a PeftModel, which a verifier is not.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.model.has_own_backbone:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.model.load_trained(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.model.has_own_backbone or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self.model.load_trained(self.state.best_model_checkpoint)
