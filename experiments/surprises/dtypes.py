"""CPU time, relative to float32's, of a linear layer and of attention in bfloat16 and float16, one thread, best of 5.

python -m experiments.surprises.dtypes; the widths are SmolLM2-135M's, Llama-3.2-1B's and a batch of training
"""

import time

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

torch.set_num_threads(1)
print(
    torch.__version__,
    torch.backends.cpu.get_cpu_capability(),
    "mkldnn bf16:",
    torch.ops.mkldnn._is_mkldnn_bf16_supported(),
)


def best(function) -> float:
    times = []
    for _ in range(5):
        start = time.thread_time()
        function()
        times.append(time.thread_time() - start)
    return min(times)


for rows, width, out in (
    (1, 576, 1536),
    (1, 576, 49152),
    (1, 2048, 8192),
    (64, 576, 1536),
    (64, 2048, 8192),
    (512, 576, 1536),
):
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, w = torch.randn(rows, width).to(dtype), torch.randn(out, width).to(dtype)
        seconds[dtype] = best(lambda x=x, w=w: linear(x, w))
    f32, *others = seconds.values()
    print(f"linear {rows} x {width} -> {out}: bfloat16 {others[0] / f32:.2f}, float16 {others[1] / f32:.2f}")

SHAPES = ((576, 960), (576, 576), (576, 3072), (1536, 576))  # of SmolLM2-135M's layers


@torch.inference_mode()
def stack(weights: list[torch.Tensor], rows: int) -> float:
    """All layers once, as in a step of decoding: their weights no longer lie in a cache."""
    inputs = {width: torch.randn(rows, width, dtype=weights[0].dtype) for width, _ in SHAPES}
    return best(lambda: [linear(inputs[weight.shape[1]], weight) for weight in weights])


layers = [torch.randn(out, width) for _ in range(30) for width, out in SHAPES]
for rows in (1, 2, 4, 16):
    seconds = [stack([w.to(dtype) for w in layers], rows) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    ratios = f"bfloat16 {seconds[1] / seconds[0]:.2f}, float16 {seconds[2] / seconds[0]:.2f}"
    print(f"30 layers in turn, {rows} x: {ratios}")
for queries, keys in ((1, 512), (64, 512), (512, 512)):
    seconds = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k = torch.randn(1, 9, queries, 64).to(dtype), torch.randn(1, 9, keys, 64).to(dtype)
        seconds.append(best(lambda q=q, k=k: scaled_dot_product_attention(q, k, k)))
    print(
        f"attention {queries} x {keys}: bfloat16 {seconds[1] / seconds[0]:.2f}, float16 {seconds[2] / seconds[0]:.2f}"
    )
