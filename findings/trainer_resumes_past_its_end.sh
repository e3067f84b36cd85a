#!/usr/bin/env bash
# transformers 5.17.0 and 5.24.0: a Trainer that resumes from the checkpoint of its last step trains on.
#
# The Trainer writes a checkpoint at its last step. Where num_train_epochs is no whole number, a run that was killed between
# that checkpoint and its own end, and is started again with resume_from_checkpoint, goes on in the epoch and stops one step
# late, with other weights than a run left alone; with whole epochs it stops where it is. Seen with torch 2.13.0 on a CPU,
# 20 examples, batches of 2:
#
#   half an epoch: step 5 of 5
#   resumed at its end: step 6 of 5
#   an epoch: step 10 of 10
#   resumed at its end: step 10 of 10
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/probe.py" <<'PYTHON'
import sys

import torch
from torch import nn
from transformers import Trainer, TrainingArguments


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return {"loss": (self.weight * x).mean()}


def train(folder, epochs, steps, resume=None):
    data = [{"x": torch.ones(1)} for _ in range(20)]
    settings = {"save_steps": steps, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(folder, per_device_train_batch_size=2, num_train_epochs=epochs, **settings)
    trainer = Trainer(Mean(), arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return f"step {trainer.state.global_step} of {trainer.state.max_steps}"


for name, epochs, steps in (("half an epoch", 0.5, 5), ("an epoch", 1.0, 10)):
    folder = f"{sys.argv[1]}/{epochs}"
    print(f"{name}: {train(folder, epochs, steps)}")
    print(f"resumed at its end: {train(folder, epochs, steps, f'{folder}/checkpoint-{steps}')}")
PYTHON
expected="half an epoch: step 5 of 5
resumed at its end: step 6 of 5
an epoch: step 10 of 10
resumed at its end: step 10 of 10"
for version in 5.17.0 5.24.0; do
  python3 -m venv --clear "$folder/venv"
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 "transformers==$version" accelerate==1.15.0 2>/dev/null
  seen=$(HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/probe.py" "$folder/$version" 2>/dev/null | grep " of ")
  echo "transformers $version"
  echo "$seen"
  [ "$seen" = "$expected" ] || { echo "changed: expected $expected" >&2; exit 1; }
done
