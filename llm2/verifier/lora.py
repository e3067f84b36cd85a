"""Low-rank adapters on a verifier's backbone: made, shared, stored, merged.

A LoRA verifier differs from System 1 in two small matrices a linear layer (Hu et al., arXiv 2106.09685) and in its
scalar head. Its base weights are System 1's own: in training they are frozen, in decoding they can be the very same
Parameters. Knows modules and folders; what the scores are for it does not know.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from llm2.errors import UserError

ADAPTER = "default"  # peft's own name for the only adapter
PREFIX = "base_model.model."  # before every key of an adapter file that peft is to understand
DEFAULTS = {"rank": 16, "alpha": 32.0, "dropout": 0.0, "targets": "all-linear"}


def complete(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with DEFAULTS for what they leave out; plain values, ready for config.json."""
    if unknown := set(settings) - set(DEFAULTS):
        raise UserError(f"unknown LoRA setting {sorted(unknown)[0]!r}; expected some of {', '.join(DEFAULTS)}")
    settings = {**DEFAULTS, **settings}
    targets = settings["targets"]
    return {**settings, "targets": targets if isinstance(targets, str) else list(targets)}


def peft_config(settings: Mapping[str, Any], base_model: str | None = None) -> LoraConfig:
    return LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=settings["targets"],
        base_model_name_or_path=base_model,
    )


def inject(backbone: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Put an adapter that changes nothing yet (B is zero) on the target layers, and freeze everything else."""
    try:
        inject_adapter_in_model(peft_config(settings), backbone, ADAPTER)
    except ValueError as error:
        raise UserError(f"the LoRA targets {settings['targets']!r} do not fit the backbone: {error}") from None


def clone_sharing_weights(
    model: PreTrainedModel, instead: Mapping[nn.Module, nn.Module] | None = None
) -> PreTrainedModel:
    """Another model of the same modules over the same Parameters and buffers: no weight is copied.

    Args:
        instead: modules of the model, and what stands in their places in the other one.
    """
    memo = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    memo |= {id(module): other for module, other in (instead or {}).items()}
    return copy.deepcopy(model, memo)


def adapter_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a verifier's state the adapter and the head, by the names that peft's files have."""
    return {
        PREFIX + name.removeprefix("backbone.").replace(f".{ADAPTER}.", "."): tensor
        for name, tensor in state.items()
        if ".lora_" in name or name.startswith("score.")
    }


def save_adapter(folder: Path, state: Mapping[str, torch.Tensor], settings: Mapping[str, Any], base: str) -> None:
    """adapter_model.safetensors and adapter_config.json, of a verifier's `state`."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in adapter_state(state).items()}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config = peft_config(settings, base).to_dict() | {"inference_mode": True, "peft_type": "LORA"}
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted)  # peft keeps target names in a set
    (folder / CONFIG_NAME).write_text(text + "\n")


def load_adapter(name: str, verifier: nn.Module, **options: Any) -> None:
    """Read the adapter and the head of a folder or hub id into a verifier that `inject` has prepared."""
    path = cached_file(name, SAFETENSORS_WEIGHTS_NAME, **options)
    set_adapter(verifier, load_file(path), path)


def set_adapter(verifier: nn.Module, found: Mapping[str, torch.Tensor], origin: str) -> None:
    """Put what `adapter_state` gives, from the file `origin`, into a verifier.

    Raises UserError where the two differ in a name or a shape: the adapter was made from another System 1.
    """
    own = verifier.state_dict()
    names = dict(zip(adapter_state(own), (n for n in own if ".lora_" in n or n.startswith("score.")), strict=True))
    for key in sorted(found.keys() | names.keys()):
        expected = tuple(own[names[key]].shape) if key in names else "no such weight"
        stored = tuple(found[key].shape) if key in found else "no such weight"
        if stored != expected:
            raise UserError(
                f"{origin}: key {key!r}: found {stored}, expected {expected}: "
                "the adapter was not made from this System 1"
            )
    verifier.load_state_dict({names[key]: tensor for key, tensor in found.items()}, strict=False)


def merge(backbone: PreTrainedModel) -> None:
    """W + scale * B A in place of every adapted layer's W, as a new Parameter: a shared W stays as it is."""
    for name, layer in list(backbone.named_modules()):
        if isinstance(layer, LoraLayer):
            base = layer.get_base_layer()
            base.weight = nn.Parameter(base.weight.detach() + layer.get_delta_weight(ADAPTER).detach())
            backbone.set_submodule(name, base)
    backbone.requires_grad_(True)
    del backbone.peft_config
