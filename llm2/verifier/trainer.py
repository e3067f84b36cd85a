"""VerifierTrainer: a transformers Trainer whose loss is the mean over the pairs of a whole optimizer step."""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer, set_seed
from transformers.trainer import TRAINING_ARGS_NAME

from llm2.common.chat import resolve_template
from llm2.common.home import with_home
from llm2.common.loading import load_tokenizer
from llm2.errors import UserError
from llm2.verifier.arguments import (
    VerifierTrainingArguments,
    new_verifier,
    refuse_long_solutions,
    refuse_options,
    refuse_steps,
    refuse_unknown_tokens,
)
from llm2.verifier.checkpoints import PathsWithoutHome
from llm2.verifier.collate import verifier_batch
from llm2.verifier.frozen_states import FrozenExample, FrozenStates, frozen_batch
from llm2.verifier.loss import IGNORE_INDEX, NO_PAIR, pairwise_loss
from llm2.verifier.masks import BLOCK
from llm2.verifier.model import ProcessVerifier
from llm2.verifier.pair_metrics import (
    WithSystem1Margins,
    choice_metrics,
    compute_metrics,
    fork_rivals,
    guided_metrics,
    pair_info,
)
from llm2.verifier.system1 import System1Measures, measure_system1
from llm2.verifier.triplets import EMPTY_EXAMPLE, Example, load_examples

READ_BATCH = 16  # solutions of a forward that reads frozen states
ALL_FINITE = torch.iinfo(torch.long).max  # in place of the id of a pair whose margin is not finite
NOT_FOR_THE_MODEL = ("pair_ids", "pair_weights", "pair_targets", "pair_offsets")


class PaddedSampler(Sampler[int]):
    """The examples of an epoch, shuffled by seed and epoch, then indices beyond them until the last step is full.

    So every rank gets as many batches, and no example is repeated to fill the last one. The epoch of the last of
    `num_steps` steps ends with it: a Trainer that resumes after its last step would go on.
    """

    def __init__(self, num_examples: int, step_size: int, seed: int, num_steps: int) -> None:
        self.num_examples, self.step_size, self.seed, self.num_steps = num_examples, step_size, seed, num_steps
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_examples // self.step_size) * self.step_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_examples, generator=generator).tolist()
        left = max(0, self.num_steps * self.step_size - self.epoch * len(self))
        yield from [*order, *range(self.num_examples, len(self))][:left]


class PaddedDataset(Dataset):
    """The examples, and an empty one at every index beyond them."""

    def __init__(self, examples: Sequence[Example] | FrozenStates) -> None:
        self.examples = examples
        self.empty = examples.empty if isinstance(examples, FrozenStates) else EMPTY_EXAMPLE

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example | FrozenExample:
        return self.examples[index] if index < len(self.examples) else self.empty


def as_examples(
    data: Sequence[Example] | Iterable[Mapping[str, Any]],
    args: VerifierTrainingArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    name: str,
) -> Sequence[Example]:
    """Rows checked and tokenized as a file's lines are; Examples as they are."""
    rows = iter(data)
    first = next(rows, None)
    if first is None or isinstance(first, Example):
        return data if first else ()
    if tokenizer is None:
        raise UserError("processing_class: expected the tokenizer of the rows, found none")
    template = resolve_template(args.chat_template)
    sizes = {"max_length": args.max_length, "quality": args.quality_weight}
    return load_examples(name, tokenizer, template, rows=chain([first], rows), **sizes)[0]  # a generator begins once


class VerifierTrainer(Trainer):
    """A transformers Trainer of a ProcessVerifier. An evaluation reports the metrics of `pair_metrics`.

    Args:
        model: System 1's name or folder, from which `args` make a new verifier; or a verifier.
        train_dataset, eval_dataset: rows of `messages` and `samples` (and `quality`), or of `prompt`, `completions` and
            `labels` (see `steps`), such as a `datasets.Dataset`; each is checked as a line of a file is. Or `Example`s.
        processing_class: the tokenizer; System 1's own when None and `model` is a name.
        system1: what was measured of System 1 before; measured here when None and `guided_beta` or `model` needs it.
        options: as for any Trainer (callbacks, optimizers, ...); a `compute_metrics` replaces ours.

    Raises UserError for rows that do not fit, and for options that exclude each other.
    """

    def __init__(
        self,
        model: str | Path | ProcessVerifier,
        args: VerifierTrainingArguments,
        train_dataset: Sequence[Example] | Iterable[Mapping[str, Any]],
        eval_dataset: Sequence[Example] | Iterable[Mapping[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        system1: System1Measures | None = None,
        **options: Any,
    ) -> None:
        self.loss, self._first_bad = args, ALL_FINITE
        if args.n_gpu > 1:  # the Trainer would wrap the model in DataParallel
            raise UserError(
                f"one process sees {args.n_gpu} GPUs, and the batch would be multiplied by them; expected one process "
                "for each (`llm2 train` starts them), or one GPU in CUDA_VISIBLE_DEVICES"
            )
        name = with_home(model.config.base_model) if isinstance(model, ProcessVerifier) else str(model)
        if not isinstance(model, ProcessVerifier):
            refuse_options(name, args)
            processing_class = processing_class or load_tokenizer(name)
        train_set = as_examples(train_dataset, args, processing_class, "train_dataset")
        eval_set = as_examples(eval_dataset or (), args, processing_class, "eval_dataset")
        if not train_set:
            raise UserError("train_dataset: expected at least one row, found none")
        refuse_steps(args, train_set, eval_set)
        pairs = pair_info(eval_set, processing_class) if eval_set else {}
        if eval_set and not pairs:
            raise UserError("eval_dataset: expected a pair with a clear winner, found none")
        guided = args.guided_beta is not None
        if system1 is None and (not isinstance(model, ProcessVerifier) or guided):
            system1 = measure_system1(name, args, train_set, eval_set, pairs, args.device, "guided_pair_loss")
        if not isinstance(model, ProcessVerifier):
            set_seed(args.seed)  # the head is drawn before the Trainer sets the seed itself
            model = new_verifier(name, args, args.device)
            model.set_unembedding(system1.unembedding)
        model.dropout.p = args.dropout
        refuse_long_solutions(model.backbone, max(len(example.ids) for example in chain(train_set, eval_set)))
        if processing_class is not None:
            refuse_unknown_tokens(model, processing_class)
            processing_class = copy(processing_class)  # saved with the verifier, by which later runs know its template
            processing_class.chat_template = resolve_template(args.chat_template) or processing_class.chat_template
            for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(model.config, special, getattr(processing_class, special))  # the Trainer would, and warn
        margins = system1.eval_margins if system1 is not None else {}
        forks = fork_rivals(eval_set, margins) if margins else ()
        data = {"train": train_set, "eval": eval_set}
        if guided:
            data["train"] = WithSystem1Margins(train_set, system1.train_margins)
            data["eval"] = WithSystem1Margins(eval_set, margins)
        if model.config.is_head:
            model.to(args.device)
            data = {split: FrozenStates(model, examples, READ_BATCH) for split, examples in data.items()}

        def metrics(prediction: EvalPrediction) -> dict[str, float]:
            """Over all held-out pairs at once, so that batches and ranks have no weight."""
            real = prediction.label_ids != NO_PAIR
            ids, found = (array[real].tolist() for array in (prediction.label_ids, prediction.predictions))
            by_id = dict(zip(ids, found, strict=True))
            if bad := [pair_id for pair_id, margin in by_id.items() if not math.isfinite(margin)]:
                self._refuse(min(bad))
            found = compute_metrics(by_id, pairs)
            found |= choice_metrics(forks, by_id) if forks else {}
            return found | (guided_metrics(by_id, pairs, margins) if margins else {})

        super().__init__(
            model=model,
            args=args,
            train_dataset=PaddedDataset(data["train"]),
            eval_dataset=data["eval"] if eval_set else None,
            processing_class=processing_class,
            data_collator=self.collate,
            **{"compute_metrics": metrics if eval_set else None, **options},
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
                branches=self.model.config.reads_candidates,
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
            f"{where}: the verifier's score or the loss is NaN or infinite, expected finite numbers; try a lower "
            "learning_rate or bf16=false"
        )

    def _get_num_items_in_batch(self, batch_samples: Sequence[dict], device: torch.device) -> torch.Tensor:
        """(2,) over accumulation and ranks: the sum of the pair weights, and the number of LM targets."""
        weight = sum(batch["pair_weights"].sum().item() for batch in batch_samples)
        targets = sum((batch["targets"] != IGNORE_INDEX).sum().item() for batch in batch_samples if "targets" in batch)
        return self.accelerator.reduce(torch.tensor([weight, targets], device=device), reduction="sum")

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        args = self.args
        step_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        epoch = math.ceil(len(self.train_dataset) / step_size)
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
        seed = args.seed if args.data_seed is None else args.data_seed
        return PaddedSampler(len(self.train_dataset), step_size, seed, steps)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Raises UserError for another dataset: the groups and System 1's margins are those of the trainer's own."""
        if eval_dataset is not None and eval_dataset is not self.eval_dataset:
            raise UserError("eval_dataset: expected none here; make a VerifierTrainer with the pairs to evaluate on")
        return super().get_eval_dataloader(eval_dataset)

    get_test_dataloader = get_eval_dataloader

    def save_model(self, output_dir: str | None = None, **options: Any) -> None:
        """Without the Trainer's own pickle of its arguments, which holds absolute paths and which nothing reads."""
        super().save_model(output_dir, **options)
        if self.args.should_save:
            Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    # The Trainer looks for all weights, or for an adapter in a PeftModel, which a verifier is not.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.model.config.is_whole:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.model.load_trained(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.model.config.is_whole or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self.model.load_trained(self.state.best_model_checkpoint)
