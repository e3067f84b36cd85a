"""How many weights a first step of AdamW moves where the weights are bfloat16, on a real model and real gradients.

python -m experiments.surprises.bf16_steps MODEL; 2e-5 is the published run's learning rate
"""

import sys

import torch

from llm2.common.chat import CHATML_PLAIN, encode_chats
from llm2.common.loading import load_system1, load_tokenizer
from llm2.tasks import load_task, read_problems

model, tokenizer, task = load_system1(sys.argv[1], torch.device("cpu")), load_tokenizer(sys.argv[1]), load_task("mawps")
chats = [task.conversation(problem) for problem in read_problems(task, "train", 8)]
for ids in encode_chats(tokenizer, chats, CHATML_PLAIN):
    batch = torch.tensor([ids])
    model(batch, labels=batch, use_cache=False).loss.backward()
parameters = [p for p in model.parameters() if p.dim() == 2]
for learning_rate in (2e-5, 3e-4):
    for dtype in (torch.float32, torch.bfloat16):
        moved = steps = wanted = along = count = 0
        for parameter in parameters:
            copy = torch.nn.Parameter(parameter.detach().to(dtype))
            copy.grad = parameter.grad.to(dtype)
            before = copy.detach().clone()
            torch.optim.AdamW([copy], lr=learning_rate, weight_decay=0.0).step()
            change = (copy.detach() - before).float()
            step = -learning_rate * parameter.grad.sign()  # Adam's first step
            moved += (change != 0).sum().item()
            steps += (step != 0).sum().item()
            along += (change * step).sum().item()
            wanted += step.square().sum().item()
            count += change.numel()
        print(
            f"lr {learning_rate} {dtype}: {moved / count:.1%} of weights move, {steps / count:.1%} have gradients",
            end="; ",
        )
        print(f"{along / wanted:.1%} of the step is taken")
