"""Linear layers of SmolLM2's sizes in int8 against float32 on a CPU: torch's dynamic quantisation and torchao's.

python -m experiments.surprises.int8; one thread; needs torchao
"""

import time
import warnings

import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

warnings.simplefilter("ignore")  # torch.ao is deprecated
torch.set_num_threads(1)


def seconds(layer, rows, repeats):
    """CPU time of one call, the best of 4."""
    times = []
    for _ in range(4):
        start = time.process_time()
        for _ in range(repeats):
            layer(rows)
        times.append((time.process_time() - start) / repeats)
    return min(times)


@torch.inference_mode()
def main():
    for count in (1, 16, 64, 256):
        for width, output in ((576, 576), (576, 1536), (1536, 576), (576, 49152)):
            rows, plain = torch.randn(count, width), torch.nn.Sequential(torch.nn.Linear(width, output, bias=False))
            old = torch.ao.quantization.quantize_dynamic(plain, {torch.nn.Linear}, dtype=torch.qint8)
            repeats = 2 if output > 10_000 else 20
            figures = [seconds(plain, rows, repeats), seconds(old, rows, repeats)]
            quantize_(plain, Int8DynamicActivationInt8WeightConfig())
            figures.append(seconds(plain, rows, max(1, repeats // 10)))
            ratios = [figures[0] / figure for figure in figures[1:]]
            shares = f"torch.ao {ratios[0]:.2f}, torchao {ratios[1]:.3f}"
            print(f"{count} rows, {width} -> {output}: {shares} of float32's speed")


main()
