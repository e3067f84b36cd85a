"""Arguments of a transformers Trainer that the verifier and its rivals have in common."""

from typing import Any

import torch
from transformers import TrainingArguments

from llm2.common.distributed import dist_info
from llm2.config import OptimizerConfig
from llm2.errors import UserError

# Keys that OptimizerConfig and TrainingArguments share.
PASSED_ON = ("num_train_epochs", "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm")
PASSED_ON += ("per_device_train_batch_size", "bf16")
# Its name since transformers 5.24, which warns of the old one.
CHECKPOINTING = "activation_checkpointing"
if not hasattr(TrainingArguments, CHECKPOINTING):
    CHECKPOINTING = "gradient_checkpointing"


def optimizer_arguments(config: OptimizerConfig, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments and of TRL's configs. Raises UserError where batch sizes do not fit."""
    world_size = dist_info().world_size
    forward_size = config.per_device_train_batch_size * world_size
    if config.global_batch_size % forward_size:
        raise UserError(
            f"global_batch_size {config.global_batch_size}: expected a multiple of per_device_train_batch_size "
            f"{config.per_device_train_batch_size} x {world_size} processes"
        )
    return {
        **{name: getattr(config, name) for name in PASSED_ON},
        CHECKPOINTING: config.gradient_checkpointing,
        "warmup_steps": config.warmup_ratio,  # below 1 it is a ratio
        "gradient_accumulation_steps": config.global_batch_size // forward_size,
        "use_cpu": device.type == "cpu",
    }
