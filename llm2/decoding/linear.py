"""Linear layers that multiply with copies of their weights, laid out for a CPU."""

import math

import torch
from torch import nn

from llm2.common.loading import resolve_dtype
from llm2.decoding.cuda_graphs import bucket
from llm2.errors import UserError

LARGEST = torch.finfo(torch.float16).max
KEY = "float16_weights: found true"
FBGEMM = ("x86", "fbgemm")  # torch's quantized engines that have it
SAMPLED = 64  # values of a weight that tell whether it was trained


class Snapshot:
    """Tells whether a weight was trained in place since a copy of it was made, by some of its values.

    Not by its version, which fused optimizers leave alone. A change of a few values alone may go unnoticed.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.values = self._values()

    @property
    def changed(self) -> bool:
        return not torch.equal(self._values(), self.values)

    def _values(self) -> torch.Tensor:
        values = self.weight.detach().flatten()
        return values[:: max(1, len(values) // SAMPLED)].nan_to_num()  # NaN equals nothing


class CopiedLinear(nn.Module):
    """A linear layer over a copy of its weight; `weight` and `bias` stay the layer's own Parameters."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias, self.copied = layer.weight, layer.bias, [Snapshot(layer.weight)]


def is_plain(layer: nn.Module) -> bool:
    """Whether it is a linear layer and nothing more: a stand-in would run no hooks."""
    return type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks


class OneDNNLinear(CopiedLinear):
    """A weight in oneDNN's own layout, in which `nn.Linear` puts it anew at each call.

    In bfloat16 it gives the same values. Few tokens take half the time; of float32 that holds for a whole vocabulary of
    outputs alone. torch.compile uses the same operators on a CPU.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.reordered = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())

    @staticmethod
    def takes(layer: nn.Module) -> bool:
        """Whether it can stand in for a layer: a plain one on a CPU, in float32, or in bfloat16 if oneDNN can there."""
        if not is_plain(layer) or layer.weight.device.type != "cpu":
            return False
        if layer.weight.dtype == torch.bfloat16:
            return torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return layer.weight.dtype == torch.float32

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., N, in) -> (..., N, out)."""
        count = states.shape[-2]
        if padding := bucket(count, 8) - count:  # oneDNN caches a kernel for every number of tokens that it meets
            states = nn.functional.pad(states, (0, 0, 0, padding))
        bias = None if self.bias is None else self.bias.detach()
        return torch.ops.mkldnn._linear_pointwise(states, self.reordered, bias, "none", [], "")[..., :count, :]


def use_onednn(model: nn.Module, dtype: torch.dtype | None = None, largest: float = math.inf) -> None:
    """Replace all plain linear layers within a model, or those in `dtype`, by a OneDNNLinear, unless the copies would
    take more than `largest` bytes."""
    layers = [(name, layer) for name, layer in model.named_modules() if OneDNNLinear.takes(layer)]
    layers = [(name, layer) for name, layer in layers if dtype in (None, layer.weight.dtype)]
    if sum(layer.weight.nbytes for _, layer in layers) <= largest:
        for name, layer in layers:
            model.set_submodule(name, OneDNNLinear(layer))


class Float16Linear(CopiedLinear):
    """A weight in float16, on an x86 CPU; activations, products and sums stay in float32 (FBGEMM).

    Few tokens at a time wait for the weights to come from memory, and these are half as many bytes; on many tokens it
    is a little faster than MKL too. Each weight is rounded once: by at most 2^-11 of itself, or 3e-8. The weights of a
    checkpoint in bfloat16 are all but exact in it.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        weight, bias = (None if each is None else each.detach() for each in (layer.weight, layer.bias))
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., N, in) -> (..., N, out)."""
        return torch.ops.quantized.linear_dynamic_fp16(states, self.packed)


def use_float16_weights(model: nn.Module) -> None:
    """Replace all plain linear layers within a model by a Float16Linear, but for those of adapters.

    Raises UserError as `require_float16_weights`, and for a weight that float16 cannot hold.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if is_plain(layer)]
    for name, layer in layers:
        if "lora_" in name:
            continue
        weight = layer.weight.detach()
        require_float16_weights(True, weight.device, weight.dtype)
        largest = weight.abs().amax().item()
        if not largest <= LARGEST:  # NaN too: FBGEMM would make both a number, also in the layer's own weight
            raise UserError(f"{KEY}, and {name} has a weight of {largest:.3g}, expected at most {LARGEST:,.0f}")
        model.set_submodule(name, Float16Linear(layer))


def require_float16_weights(
    wanted: bool, device: torch.device, dtype: str | torch.dtype | None, engine: str = "llm2"
) -> None:
    """Raise UserError where they are wanted and cannot be had: another engine, device or dtype, no FBGEMM."""
    if not isinstance(wanted, bool):
        raise UserError(f"float16_weights: found {wanted!r}, expected true or false")
    if not wanted:
        return
    if engine != "llm2":
        raise UserError(f"{KEY} with engine {engine}, expected engine llm2")
    if device.type != "cpu":
        raise UserError(f"{KEY} on {device.type}, expected device cpu; a GPU takes dtype=float16")
    if resolve_dtype(dtype, device) != torch.float32:
        raise UserError(f"{KEY} with dtype {dtype}, expected float32, in which it multiplies")
    if (found := torch.backends.quantized.engine) not in FBGEMM:
        raise UserError(f"{KEY}, and torch's quantized engine is {found}, expected x86 or fbgemm, which x86 CPUs have")
