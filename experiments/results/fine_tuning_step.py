"""A step of fine-tuning on a CPU: forward and backward by transformers' Trainer with our batches, in float32 and in
bfloat16 mixed precision, and by SFTTrainer in float32.

    PYTHONPATH=. python experiments/results/fine_tuning_step.py [threads=1] [steps=7]

SmolLM2-135M-Instruct, 8 of MAWPS's training problems with their equations a step, all in turn on the same problems.
Seconds of SFTTrainer, and of mixed precision, over those of float32: median and range over steps; the first is not
counted. With each step, how far the gradients of the embedding are from float32's.
"""

import sys
import tempfile
import time

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from benchmarks.runner import spread
from experiments.baselines.finetune import collator, examples
from llm2.common.chat import resolve_template
from llm2.common.loading import load_system1, load_tokenizer
from llm2.exploration.solutions import load_problems, tokenize_solutions
from llm2.tasks import load_task

ROWS = 8
threads, steps = (int((sys.argv[i : i + 1] or [default])[0]) for i, default in ((1, "1"), (2, "7")))
torch.set_num_threads(threads)
tokenizer, task = load_tokenizer("smollm2"), load_task("mawps")
problems, _ = load_problems(task, "train", ROWS * (steps + 1), need_gold=True)
solutions = tokenize_solutions(task, problems, tokenizer, resolve_template("chatml-plain"), [tokenizer.eos_token_id])
rows = examples(solutions)
model = load_system1("smollm2", torch.device("cpu"), "float32")
ours = collator(model)
options = {"output_dir": tempfile.mkdtemp(), "use_cpu": True, "report_to": "none"}
trainer = Trainer(model, TrainingArguments(**options))
sft = SFTTrainer(
    load_system1("smollm2", torch.device("cpu"), "float32"),
    SFTConfig(**options, max_length=None),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
)


def seconds(trainer: Trainer, batch: dict, bf16: bool = False) -> float:
    trainer.model.train().zero_grad()
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return time.perf_counter() - start


def gradient(trainer: Trainer) -> torch.Tensor:
    return trainer.model.get_input_embeddings().weight.grad.clone()


taken = {"SFTTrainer": [], "bf16": []}
for step in range(steps + 1):
    batch = rows[ROWS * step : ROWS * (step + 1)]
    base, expected = seconds(trainer, ours(batch)), gradient(trainer)
    for name, found in (
        ("SFTTrainer", (seconds(sft, sft.data_collator(batch)), gradient(sft))),
        ("bf16", (seconds(trainer, ours(batch), bf16=True), gradient(trainer))),
    ):
        taken[name].append(found[0] / base)
        difference = ((found[1] - expected).norm() / expected.norm()).item()
        print(f"step {step}, {name}: {taken[name][-1]:.2f}, gradients differ by {difference:.1e}", flush=True)
for name, ratios in taken.items():
    print(name, {key: round(value, 2) for key, value in spread(ratios[1:]).items()})
