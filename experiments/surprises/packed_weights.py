"""Weights kept in fewer bits on a CPU, and in oneDNN's layout: speed of linear layers of SmolLM2's sizes.

python -m experiments.surprises.packed_weights; one thread, weights from memory (30 layers in turn)
"""

import time
from collections.abc import Callable

import torch
from torch import nn

from llm2.decoding.linear import Float16Linear, OneDNNLinear

LAYERS, GROUP = 30, 32
torch.set_num_threads(1)


def int8(weight: torch.Tensor, dtype: torch.dtype) -> Callable:
    scales = weight.abs().amax(1) / 127
    rounded = (weight / scales[:, None]).round().to(torch.int8)
    return lambda rows: torch.ops.aten._weight_int8pack_mm(rows.to(dtype), rounded, scales.to(dtype))


def int4(weight: torch.Tensor) -> Callable:
    groups = weight.view(len(weight), -1, GROUP)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scales = (high - low) / 15
    rounded = ((groups - low) / scales).round().to(torch.int32).view(weight.shape)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(rounded, 1)
    scales_and_zeros = torch.cat([scales, low + 8 * scales], dim=-1).transpose(0, 1).contiguous()
    return lambda rows: torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, GROUP, scales_and_zeros)


def seconds(layers: list[Callable], rows: torch.Tensor) -> float:
    """CPU time of all layers in turn, the best of 6."""
    times = []
    for _ in range(6):
        start = time.process_time()
        for layer in layers:
            layer(rows)
        times.append(time.process_time() - start)
    return min(times)


@torch.inference_mode()
def main() -> None:
    for width, output in ((576, 576), (576, 1536), (1536, 576), (576, 49152)):
        plain = [nn.Linear(width, output, bias=False) for _ in range(LAYERS if output < 10_000 else 1)]
        weights = [layer.weight for layer in plain]
        ways = {
            "float16": [Float16Linear(layer) for layer in plain],
            "int8": [int8(weight, torch.float32) for weight in weights],
            "int8, bfloat16 activations": [int8(weight, torch.bfloat16) for weight in weights],
            "int4": [int4(weight) for weight in weights],
        }
        narrow = [nn.Linear(width, output, bias=False, dtype=torch.bfloat16) for _ in plain]
        if OneDNNLinear.takes(narrow[0]):  # activations in bfloat16 too
            laid_out = [OneDNNLinear(layer) for layer in narrow]
            ways["bfloat16"] = [lambda rows, layer=layer: layer(rows.bfloat16()) for layer in narrow]
            ways["bfloat16, oneDNN's layout"] = [lambda rows, layer=layer: layer(rows.bfloat16()) for layer in laid_out]
        for count in (1, 2, 4, 16, 64):
            rows = torch.randn(count, width)
            base = seconds(plain, rows)
            speeds = ", ".join(f"{name} {base / seconds(layers, rows):.2f}" for name, layers in ways.items())
            print(f"{count} rows, {width} -> {output}, to float32's speed: {speeds}", flush=True)


main()
