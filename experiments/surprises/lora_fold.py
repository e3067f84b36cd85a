"""What folding a LoRA adapter into bfloat16 weights keeps: the rank-8 part of a real fine-tuning, layer by layer.

python -m experiments.surprises.lora_fold BASE FINETUNED [rank=8]
"""

import sys

import torch

from llm2.common.loading import load_system1

base, tuned = (load_system1(name, torch.device("cpu")).state_dict() for name in sys.argv[1:3])
rank, rows = int((sys.argv[3:] or ["8"])[0]), []
for name, weight in base.items():
    if not name.endswith("_proj.weight"):
        continue
    torch.manual_seed(0)
    u, s, v = torch.svd_lowrank((tuned[name] - weight).float(), q=rank, niter=4)
    change = (u * s) @ v.T  # what a trained adapter adds
    rounded = weight.bfloat16()
    folded = (rounded.float() + change).bfloat16()  # as merging into a bfloat16 model does
    kept = (folded.float() - rounded.float()).flatten()
    along = (kept @ change.flatten() / change.flatten().square().sum()).item()
    rows.append(
        (
            along,
            (kept - change.flatten()).norm().item() / change.norm().item(),
            (folded == rounded).float().mean().item(),
            change.norm().item() / weight.norm().item(),
        )
    )
for label, column in zip(
    ("kept along the change", "noise, of its norm", "weights that do not move", "norm, of the weight's"),
    zip(*rows, strict=True),
    strict=True,
):
    column = sorted(column)
    print(f"{label}: median {column[len(column) // 2]:.3f}, {column[0]:.3f} to {column[-1]:.3f} ({len(column)} layers)")
