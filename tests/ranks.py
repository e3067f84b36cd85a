"""One optimizer step in each of several processes, for test_distributed; rank 0 saves the change of the weights.

python -m torch.distributed.run --nproc_per_node 2 tests/ranks.py SYSTEM1 SOLUTIONS PER_DEVICE ACCUMULATION OUTPUT
"""

import sys

import torch
from test_collate import examples
from test_train import gradients

from llm2.common.distributed import destroy_group


def main(system1: str, solutions: str, per_device: str, accumulation: str, output: str) -> None:
    moved = gradients(system1, f"{output}.run", examples(int(solutions)), int(per_device), int(accumulation))
    if torch.distributed.get_rank() == 0:
        torch.save(moved, output)
    destroy_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
