"""Trainer arguments shared by the verifier and the baselines."""

from typing import Any

import torch
from tqdm import tqdm
from transformers import ProgressCallback, Trainer, TrainingArguments

from llm2.common.distributed import dist_info
from llm2.common.keys import Mark, select_keys
from llm2.config import OptimizerConfig
from llm2.errors import UserError

# Its name since transformers 5.24, which deprecates the old one.
CHECKPOINTING = "activation_checkpointing"
if not hasattr(TrainingArguments, CHECKPOINTING):
    CHECKPOINTING = "gradient_checkpointing"


class ForwardsBar(ProgressCallback):
    """A progress bar that advances with every forward, with an ETA from this run's average speed."""

    @classmethod
    def of(cls, trainer: Trainer) -> None:
        """Replace the trainer's own bar, if it has one."""
        if trainer.pop_callback(ProgressCallback) is not None:
            trainer.add_callback(cls)

    def on_train_begin(self, args, state, control, **others) -> None:
        if state.is_world_process_zero:
            steps = args.gradient_accumulation_steps
            sizes = {"total": state.max_steps * steps, "initial": state.global_step * steps}
            self.training_bar = tqdm(**sizes, desc="train", unit="forward", smoothing=0)

    def on_substep_end(self, args, state, control, **others) -> None:
        if state.is_world_process_zero:
            self.training_bar.update()

    def on_step_end(self, args, state, control, **others) -> None:
        if state.is_world_process_zero:
            self.training_bar.update(state.global_step * args.gradient_accumulation_steps - self.training_bar.n)


def optimizer_arguments(config: OptimizerConfig, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments and of TRL's configs. Raises UserError if batch sizes do not divide."""
    world_size = dist_info().world_size
    forward_size = config.per_device_train_batch_size * world_size
    if config.global_batch_size % forward_size:
        raise UserError(
            f"global_batch_size {config.global_batch_size}: expected a multiple of per_device_train_batch_size "
            f"{config.per_device_train_batch_size} x {world_size} processes"
        )
    return {
        **select_keys(config, Mark.TRAINER),
        CHECKPOINTING: config.gradient_checkpointing,
        "warmup_steps": min(config.warmup_ratio, 1 - 1e-9),  # below 1 it is a ratio, and 1 would be one step
        "gradient_accumulation_steps": config.global_batch_size // forward_size,
        "use_cpu": device.type == "cpu",
    }
