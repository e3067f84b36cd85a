"""Token preference with a reference: DPO's loss (Rafailov et al., arXiv 2305.18290) on the triplets of a verifier.

Both answers are a single token after the same prefix, so one forward over a solution gives the log-ratios of all its
pairs, as a verifier's does; TRL's DPOTrainer would read the prefix twice for each pair, and ends every answer with the
end-of-sequence token.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, Trainer, TrainingArguments

from experiments.baselines.config import PreferConfig
from experiments.baselines.training import begin, fit, save, trainer_arguments
from llm2.common.chat import resolve_template
from llm2.common.distributed import process_device
from llm2.common.loading import load_system1, load_tokenizer, resolve_device, with_training_dtype
from llm2.errors import UserError
from llm2.verifier.loss import pairwise_loss
from llm2.verifier.pair_metrics import system1_margins
from llm2.verifier.triplets import Example, load_examples


def prefer(config: PreferConfig) -> dict:
    """Write the fine-tuned System 1 to `config.output_dir`; returns counts and the mean training loss."""
    config = with_training_dtype(config)
    inputs = begin(config, "prefer")
    device = process_device(resolve_device(config.device))
    arguments = TrainingArguments(**trainer_arguments(config, device), remove_unused_columns=False)
    tokenizer = load_tokenizer(config.model)
    examples, summary = load_examples(config.train_file, tokenizer, resolve_template(config.chat_template))
    if examples.of_steps:
        raise UserError(f"{config.train_file}: expected triplets, found labelled steps")
    model = load_system1(config.model, device, "float32")
    trainer = PreferenceTrainer(model, arguments, examples, config.preference_beta)
    loss = fit(trainer, config, inputs)
    counts = {"solutions": len(examples), "triplets": summary.triplets, "training_loss": loss}
    return save(model, tokenizer, config, inputs, "prefer", counts)


class PreferenceTrainer(Trainer):
    """Trains a language model on `Example`s; the loss is the mean over the pairs of a whole optimizer step.

    The reference is the model as it is given: its log-ratios are computed once, before training.
    """

    def __init__(
        self, model: PreTrainedModel, args: TrainingArguments, examples: Sequence[Example], beta: float, **options: Any
    ) -> None:
        self.beta, self.reference = beta, system1_margins(model, examples)
        super().__init__(model, args, train_dataset=examples, data_collator=self.collate, **options)
        # compute_loss divides by the pairs of the whole step: the Trainer must not divide by accumulation steps again.
        self.model_accepts_loss_kwargs = True

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        return preference_batch(examples, self.reference)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"], use_cache=False).logits  # (B, T, V)
        row, position, gold, negative = inputs["pairs"].unbind(-1)  # (M,)
        states = logits[row, position - 1].float()  # (M, V)
        ratios = states.gather(1, gold[:, None]) - states.gather(1, negative[:, None])  # (M, 1): no normaliser is left
        margins = self.beta * (ratios.squeeze(-1) - inputs["reference"])
        loss = pairwise_loss(margins, torch.ones_like(margins), num_items_in_batch, targets=inputs["targets"])
        return loss * self.accelerator.num_processes  # over which gradients are averaged

    def _get_num_items_in_batch(self, batch_samples: Sequence[dict], device: torch.device) -> torch.Tensor:
        """The number of pairs, over accumulation and ranks."""
        pairs = sum(len(batch["pairs"]) for batch in batch_samples)
        return self.accelerator.reduce(torch.tensor(pairs, device=device), reduction="sum")


def preference_batch(examples: Sequence[Example], reference: Mapping[int, float]) -> dict[str, torch.Tensor]:
    """input_ids (B, T), padded on the right, where causal attention needs no mask; pairs (M, 4) of row, position, gold
    and negative; reference (M,): log p(gold) - log p(negative) of each pair in the reference; targets (M,): probability
    that gold is better, 1 for triplets."""
    targets = [each.gold_better or [1.0] * len(each.triplets) for each in examples]
    return {
        "input_ids": pad_sequence([torch.tensor(example.ids) for example in examples], batch_first=True),
        "pairs": torch.tensor([(row, *triplet) for row, each in enumerate(examples) for triplet in each.triplets]),
        "reference": torch.tensor(
            [reference[each.first_pair_id + i] for each in examples for i in range(len(each.triplets))]
        ),
        "targets": torch.tensor([target for each in targets for target in each]),
    }
