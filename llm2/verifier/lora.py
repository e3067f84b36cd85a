"""LoRA adapters on a verifier's backbone: inject, share weights, save, load, merge.

A LoRA verifier differs from System 1 in two small matrices per linear layer (Hu et al., arXiv 2106.09685) and in its
scalar head. Its base weights are System 1's: frozen in training, and in decoding they can be the same Parameters.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from llm2.errors import UserError

PREFIX = "base_model.model."  # what peft puts before every key of an adapter file
HEAD = "score.weight"
MIN_KEPT = 0.5  # share of an adapter that merging into rounded weights must keep


def peft_config(settings: Mapping[str, Any], **options: Any) -> LoraConfig:
    return LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=settings["targets"],
        **options,
    )


def inject(backbone: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Put an adapter that changes nothing yet (B is zero) on the target layers, and freeze everything else.

    It is in float32, whatever the backbone is in, as adapter files are.
    """
    try:
        inject_adapter_in_model(peft_config(settings), backbone)
    except ValueError as error:
        raise UserError(f"the LoRA targets {settings['targets']!r} do not fit the backbone: {error}") from None
    for name, layer in backbone.named_modules():
        if isinstance(layer, ParamWrapper):
            raise UserError(
                f"the LoRA targets {settings['targets']!r}: they include the parameters of {name}, which are no linear "
                "layer; expected the names of linear layers, such as [q_proj, k_proj, v_proj, o_proj]"
            )
    layers = [layer for layer in backbone.modules() if isinstance(layer, LoraLayer)]
    if any(isinstance(layer.get_base_layer(), nn.Embedding) for layer in layers):  # perhaps the output embedding
        raise UserError(f"the LoRA targets {settings['targets']!r} hold an embedding; expected linear layers")
    for layer in layers:
        layer.lora_A.float()
        layer.lora_B.float()


def clone_sharing_weights(
    model: PreTrainedModel, replaced: Mapping[nn.Module, nn.Module] | None = None
) -> PreTrainedModel:
    """Another model of the same modules over the same Parameters and buffers: no weight is copied.

    Args:
        replaced: modules of the model, and what stands in their place in the clone.
    """
    memo = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    memo |= {id(module): other for module, other in (replaced or {}).items()}
    return copy.deepcopy(model, memo)


def adapter_state(verifier: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter and the heads of a verifier's `state`, by the keys of peft's adapter files.

    A verifier that scores by System 1's own output embedding has no score head.
    """
    of_backbone = {name.removeprefix("backbone."): tensor for name, tensor in state.items() if name != HEAD}
    adapter = get_peft_model_state_dict(verifier.backbone, of_backbone, save_embedding_layers=False)
    head = {name: state[name] for name in _heads(verifier)}
    return {PREFIX + name: tensor for name, tensor in {**adapter, **head}.items()}


def save_adapter(folder: Path, adapter: Mapping[str, torch.Tensor], settings: Mapping[str, Any], base: str) -> None:
    """Write adapter_model.safetensors and adapter_config.json, which peft can read; `adapter` is an adapter_state."""
    tensors = {key: tensor.detach().contiguous().cpu() for key, tensor in adapter.items()}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config = peft_config(settings, base_model_name_or_path=base, inference_mode=True)
    config.target_modules = settings["targets"]  # peft's own set has another order in every process
    config.save_pretrained(folder)


def load_adapter(name: str, verifier: PreTrainedModel, **options: Any) -> None:
    """Read the adapter and the head of a folder or hub id into a verifier that `inject` has prepared."""
    # Not peft's load_peft_weights: without a safetensors file it would unpickle adapter_model.bin.
    path = cached_file(name, SAFETENSORS_WEIGHTS_NAME, **options)
    set_adapter(verifier, load_file(path), path)


def set_adapter(verifier: PreTrainedModel, adapter: Mapping[str, torch.Tensor], origin: str) -> None:
    """Put an adapter_state, read from `origin`, into a verifier.

    Raises UserError where a key or a shape differs: the adapter was made from another System 1. peft's loading would
    ignore keys that are missing or unknown.
    """
    expected = adapter_state(verifier, verifier.state_dict())
    for key in sorted(adapter.keys() | expected.keys()):
        shapes = [tuple(state[key].shape) if key in state else "no such weight" for state in (adapter, expected)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{origin}: key {key!r}: found {shapes[0]}, expected {shapes[1]}: "
                "the adapter was not made from this System 1"
            )
    set_peft_model_state_dict(verifier.backbone, dict(adapter))
    verifier.load_state_dict({name: adapter[PREFIX + name] for name in _heads(verifier)}, strict=False)


def _heads(verifier: PreTrainedModel) -> list[str]:
    """Keys of what an adapter's file holds besides the adapter."""
    score = [HEAD] if verifier.config.reads_candidates else []
    return score + [name for name in verifier.state_dict() if name.startswith("token_weight.")]


def merge(backbone: PreTrainedModel) -> None:
    """Replace the weight W of every adapted layer by W + scale * B A, a new Parameter: a shared W is not changed.

    The sum is taken in float32 and rounded once. Raises UserError where the rounding loses most of the adapter.
    """
    adapted = [(name, layer) for name, layer in backbone.named_modules() if isinstance(layer, LoraLayer)]
    kept = total = 0.0
    for name, layer in adapted:
        base, delta = layer.get_base_layer(), layer.get_delta_weight("default").detach()
        weight = base.weight.detach()
        base.weight = nn.Parameter((weight.float() + delta).to(weight.dtype))
        kept += ((base.weight.detach().float() - weight.float()) * delta).sum().item()
        total += delta.square().sum().item()
        backbone.set_submodule(name, base)
    if kept < MIN_KEPT * total:
        raise UserError(
            f"merged in {backbone.dtype}, the adapter loses {1 - kept / total:.0%} of what it adds to the weights: "
            "it is small beside them; expected dtype=float32, or an adapter that is not merged"
        )
    backbone.requires_grad_(True)
    del backbone.peft_config
