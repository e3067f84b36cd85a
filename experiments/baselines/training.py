"""What the trainers of all rivals have in common: arguments of a transformers Trainer, and the folder they write."""

import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from llm2.common.chat import resolve_template
from llm2.common.config_file import write_config
from llm2.common.distributed import dist_info
from llm2.common.files import whole_files
from llm2.common.inputs import Digests, digests, write_inputs
from llm2.common.training import ForwardsBar, optimizer_arguments
from llm2.config import OptimizerConfig
from llm2.errors import UserError
from llm2.verifier import checkpoints

CHECKPOINTS = "checkpoints"  # in output_dir, until the model is written
SHARE = 0.1  # of the steps, between checkpoints and between logged losses, so that no checkpoint cuts an interval


def trainer_arguments(config: OptimizerConfig, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments and of TRL's configs."""
    return {
        **optimizer_arguments(config, device),
        "output_dir": str(Path(config.output_dir, CHECKPOINTS)),
        "save_steps": SHARE,
        "save_total_limit": 1,
        "logging_steps": SHARE,
        "report_to": "none",
        "dataloader_pin_memory": device.type == "cuda",
    }


def begin(config: OptimizerConfig, command: str) -> Digests:
    """The digests of what the run will read. Raises UserError if the output folder has a model of this command, or
    checkpoints that were made with another config or other inputs."""
    if Path(config.output_dir, f"{command}.yaml").exists():
        raise UserError(f"{config.output_dir} holds a model already; choose another output_dir, or delete it")
    inputs, folder = digests(config), Path(config.output_dir, CHECKPOINTS)
    if checkpoints.last_whole_checkpoint(folder) is not None:
        checkpoints.require_own(folder, config, inputs, f"set that back, or delete {folder}")
    return inputs


class NoCheckpointAtTheEnd(TrainerCallback):
    """A Trainer that resumes from a checkpoint of its last step goes on (findings/trainer_resumes_past_its_end.sh)."""

    def on_step_end(self, args, state, control, **others) -> None:
        if state.global_step == state.max_steps:
            control.should_save = False


def fit(trainer: Trainer, config: OptimizerConfig, inputs: Digests) -> float:
    """Train, from the last checkpoint if there is one; returns the mean of the logged losses, the earlier run's too."""
    ForwardsBar.of(trainer)
    trainer.add_callback(NoCheckpointAtTheEnd)
    folder = Path(config.output_dir, CHECKPOINTS)
    last = checkpoints.last_whole_checkpoint(folder)
    if dist_info().is_main:
        checkpoints.begin(folder, config, inputs)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    return fmean(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: OptimizerConfig,
    inputs: Digests,
    command: str,
    counts: dict,
) -> dict:
    """Write the model, its tokenizer, the counts (training.json), the digests and, last, the config as COMMAND.yaml, in
    the main process, and delete the checkpoints; returns the counts."""
    if dist_info().is_main:
        with whole_files(config.output_dir) as new:
            model.eval().save_pretrained(new)
            tokenizer.chat_template = resolve_template(config.chat_template) or tokenizer.chat_template
            tokenizer.save_pretrained(new)
            write_inputs(new, inputs)
            Path(new, "training.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
        write_config(config, Path(config.output_dir, f"{command}.yaml"))
        shutil.rmtree(Path(config.output_dir, CHECKPOINTS))
    return counts
