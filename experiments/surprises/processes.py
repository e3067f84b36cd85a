"""Training a real model's verifier in one process, in two, and in two under DeepSpeed's ZeRO-2, on a CPU in float32.

python -m experiments.surprises.processes MODEL TRIPLETS.jsonl FOLDER [solutions=64]; one thread a process
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
model, triplets, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
solutions = (sys.argv[4:] or ["64"])[0]
config = ROOT / "configs" / "smollm2-135m-instruct" / "train.yaml"
zero2 = yaml.safe_load((ROOT / "configs" / "accelerate" / "zero2.yaml").read_text(encoding="utf-8"))
zero2 |= {"num_processes": 2, "use_cpu": True, "mixed_precision": "no"}
folder.mkdir(parents=True, exist_ok=True)
(folder / "zero2.yaml").write_text(yaml.safe_dump(zero2), encoding="utf-8")
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
runs = {
    "one": [],
    "two": ["--processes", "2"],
    "zero2": ["--processes", "2", "--accelerate-config", str(folder / "zero2.yaml")],
}
weights = {}
for name, launch in runs.items():
    output = folder / name
    keys = {
        "model": model,
        "train_file": triplets,
        "output_dir": output,
        "limit": solutions,
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
    }
    command = [sys.executable, "-m", "llm2", "train", config, *(f"{k}={v}" for k, v in keys.items()), *launch]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    weights[name] = load_file(output / "model.safetensors")
    metrics = json.loads((output / "training.json").read_text(encoding="utf-8"))
    changes = [(weights[name][key] - tensor).abs() for key, tensor in weights["one"].items()]
    apart, mean = max(map(torch.max, changes)), sum(map(torch.sum, changes)) / sum(map(torch.numel, changes))
    print(
        f"{name}: {metrics['train_seconds']:.0f} s, {metrics['peak_memory_mib']:,.0f} MiB, loss on held-out pairs "
        f"{metrics['eval_pair_loss']:.6f}, weights at most {apart:.2g} from one process' (mean {mean:.2g})",
        flush=True,
    )
