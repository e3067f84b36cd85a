"""What the trainers of all rivals have in common: arguments of a transformers Trainer, and the folder they write."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm2.common.chat import resolve_template
from llm2.common.config_file import write_config
from llm2.common.distributed import dist_info
from llm2.common.files import whole_files
from llm2.common.inputs import Digests, digests, write_inputs
from llm2.common.training import optimizer_arguments
from llm2.config import OptimizerConfig
from llm2.errors import UserError


def import_trl() -> ModuleType:
    """TRL, which takes seconds to import. Raises UserError where it is not installed."""
    try:
        import trl
    except ImportError as error:
        raise UserError(f"this needs TRL ({error}); expected the packages of requirements.txt") from None
    return trl


def trainer_arguments(config: OptimizerConfig, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments and of TRL's configs. Checkpoints are not kept: a run takes minutes."""
    return {
        **optimizer_arguments(config, device),
        "save_strategy": "no",
        "logging_steps": 10,
        "report_to": "none",
        "dataloader_pin_memory": device.type == "cuda",
    }


def begin(config: OptimizerConfig, command: str) -> Digests:
    """The digests of what the run will read. Raises UserError if the output folder has a model of this command."""
    if Path(config.output_dir, f"{command}.yaml").exists():
        raise UserError(f"{config.output_dir} holds a model already; choose another output_dir, or delete it")
    return digests(config)


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: OptimizerConfig,
    inputs: Digests,
    command: str,
    counts: dict,
) -> dict:
    """Write the model, its tokenizer, the counts (training.json), the digests and, last, the config as COMMAND.yaml, in
    the main process; returns the counts."""
    if dist_info().is_main:
        with whole_files(config.output_dir) as new:
            model.eval().save_pretrained(new)
            tokenizer.chat_template = resolve_template(config.chat_template) or tokenizer.chat_template
            tokenizer.save_pretrained(new)
            write_inputs(new, inputs)
            Path(new, "training.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
        write_config(config, Path(config.output_dir, f"{command}.yaml"))
    return counts
