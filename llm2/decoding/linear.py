"""Linear layers that multiply with copies of their weights, laid out for a CPU."""

import torch
from torch import nn

from llm2.common.loading import resolve_dtype
from llm2.decoding.cuda_graphs import bucket
from llm2.errors import UserError

LARGEST = torch.finfo(torch.float16).max
KEY = "float16_weights: found true"


class CopiedLinear(nn.Module):
    """A float32 linear layer over a copy of its weight; `weight` and `bias` stay the layer's own Parameters."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias, self.version = layer.weight, layer.bias, _version(layer.weight)

    @property
    def stale(self) -> bool:
        """Whether the weight was changed in place, as by an optimizer, since it was copied."""
        return _version(self.weight) != self.version


class OneDNNLinear(CopiedLinear):
    """A weight without bias in oneDNN's own layout.

    For few tokens and a whole vocabulary of outputs it takes half the time of `nn.Linear`, which reorders the weight
    at each call. torch.compile uses the same operators on a CPU.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.reordered = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(1, N, in) -> (1, N, out)."""
        count = states.shape[1]
        if padding := bucket(count, 8) - count:  # oneDNN caches a kernel for every number of tokens that it meets
            states = nn.functional.pad(states, (0, 0, 0, padding))
        return torch.ops.mkldnn._linear_pointwise(states, self.reordered, None, "none", [], "")[:, :count]


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
    """Replace all plain linear layers within a model by a Float16Linear.

    Raises UserError as `require_float16_weights`, and for a weight that float16 cannot hold.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if type(layer) is nn.Linear]
    for name, layer in layers:
        weight = layer.weight.detach()
        require_float16_weights(weight.device, weight.dtype)
        if (largest := weight.abs().amax().item()) > LARGEST:
            raise UserError(f"{KEY}, and {name} has a weight of {largest:.3g}, expected at most {LARGEST:,.0f}")
        model.set_submodule(name, Float16Linear(layer))


def require_float16_weights(device: torch.device, dtype: str | torch.dtype | None, engine: str = "llm2") -> None:
    """Raise UserError for what cannot read float16 weights: another engine, device or dtype, a torch without FBGEMM."""
    if engine != "llm2":
        raise UserError(f"{KEY} with engine {engine}, expected engine llm2")
    if device.type != "cpu":
        raise UserError(f"{KEY} on {device.type}, expected device cpu; a GPU takes dtype=float16")
    if resolve_dtype(dtype, device) != torch.float32:
        raise UserError(f"{KEY} with dtype {dtype}, expected float32, in which it multiplies")
    if not has_fbgemm():
        raise UserError(f"{KEY}, and this torch has no FBGEMM for its processor, expected an x86 CPU")


def has_fbgemm() -> bool:
    """Whether torch was built with FBGEMM and runs on a processor that it knows: x86 from AVX2 on."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def _version(weight: torch.Tensor) -> int:
    return 0 if weight.is_inference() else weight._version
