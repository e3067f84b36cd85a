"""Checkpoints of a training run: find the last complete one, gather weights from DeepSpeed's shards."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from llm2.common.config_file import read_values
from llm2.common.files import write_text
from llm2.common.home import with_home, without_home
from llm2.common.inputs import Digests, as_digests, record, require_same
from llm2.common.kinds import with_kind

TRAINER_STATE = "trainer_state.json"  # also in transformers.trainer, whose import takes most of a second
BEGUN = "begun.json"  # config and digests of the run that wrote the folder's checkpoints
DEEPSPEED_LATEST = "latest"  # the file that names DeepSpeed's newest checkpoint


class PathsWithoutHome(TrainerCallback):
    """Replaces the home folder by `~` in trainer_state.json, but not in memory."""

    def on_train_begin(self, args, state, control, **others) -> None:  # a state that was resumed from a file
        state.best_model_checkpoint = with_home(state.best_model_checkpoint)

    def on_save(self, args, state, control, **others) -> None:
        path = Path(args.output_dir, f"checkpoint-{state.global_step}", TRAINER_STATE)
        if state.is_world_process_zero and path.is_file():
            saved = replace(state, best_model_checkpoint=without_home(state.best_model_checkpoint))
            saved.save_to_json(f"{path}.new")
            os.replace(f"{path}.new", path)


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint: the Trainer writes its own state last."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    for path in sorted(checkpoints, key=lambda path: -int(path.name.split("-")[-1])):
        try:
            json.loads((path / TRAINER_STATE).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            continue
        return path
    return None


def begin(folder: Path, config: Any, inputs: Digests) -> None:
    """Write config and digests of the run whose checkpoints `folder` will hold."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / BEGUN, json.dumps(record(config, inputs), indent=2) + "\n")


def require_own(folder: Path, config: Any, inputs: Digests, way_out: str) -> None:
    """Raise UserError if the checkpoints in `folder` were made with another config or other inputs."""
    earlier = with_kind(read_values(folder / BEGUN))  # JSON is YAML
    earlier["inputs"] = as_digests(earlier.get("inputs"), folder / BEGUN)
    require_same(earlier, config, inputs, f"the last checkpoint in {folder}", way_out)


def is_sharded(folder: Path) -> bool:
    """Whether the folder holds its weights only in DeepSpeed's shards."""
    gathered = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "adapter_model.safetensors")
    return (folder / DEEPSPEED_LATEST).is_file() and not any((folder / name).is_file() for name in gathered)


def sharded_state(folder: Path) -> dict[str, torch.Tensor]:
    """The float32 weights of a ZeRO-2 or ZeRO-3 checkpoint, gathered on the CPU without a process group."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # slow import, rarely needed

    return get_fp32_state_dict_from_zero_checkpoint(str(folder))


def stopped_at(checkpoint: Path, patience: int | None) -> int | None:
    """The step at which early stopping ended a run whose last checkpoint this is; None where it did not."""
    state = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    early = state["stateful_callbacks"].get(EarlyStoppingCallback.__name__, {}).get("attributes", {})
    stopped = patience is not None and early.get("early_stopping_patience_counter", 0) >= patience
    return state["global_step"] if stopped else None
