"""Greedy texts of batch 1 against all at once, ours and transformers' generate, in float32 and bfloat16.

python -m experiments.surprises.batches MODEL TASK SPLIT TEMPLATE [prompts=32] [tokens=40]
"""

import sys
import time

import torch

from llm2.common.chat import encode_chats, resolve_template
from llm2.common.loading import eos_ids, load_system1, load_tokenizer
from llm2.decoding.decoder import Decoder
from llm2.tasks import load_task, read_problems
from llm2.tasks.grading import extract_answer

name, task, split, template = sys.argv[1], load_task(sys.argv[2]), sys.argv[3], resolve_template(sys.argv[4])
prompts, tokens = int((sys.argv[5:] or ["32"])[0]), int((sys.argv[6:] or ["40"])[0])
tokenizer, problems = load_tokenizer(name), read_problems(task, split, prompts)
ids = encode_chats(tokenizer, [task.prompt(problem) for problem in problems], template, generation_prompt=True)
texts = {}


def ours(model, batch_size):
    decoder, eos = Decoder(model), eos_ids(model, tokenizer)
    return [each[0].token_ids for each in decoder.decode(ids, max_new_tokens=tokens, eos=eos, batch_size=batch_size)]


def theirs(model, batch_size):
    """transformers' generate, with padding on the left."""
    found = []
    for start in range(0, len(ids), batch_size):
        rows = ids[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        written = model.generate(**batch, do_sample=False, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id)
        found += written[:, batch["input_ids"].shape[1] :].tolist()
    return found


def text(token_ids):
    return tokenizer.decode(token_ids, skip_special_tokens=True)


def compare(label, first, second):
    changed = sum(a != b for a, b in zip(texts[first], texts[second], strict=True))
    answers = [[extract_answer(each) for each in texts[key]] for key in (first, second)]
    grades = [[a == extract_answer(p.gold) for a, p in zip(row, problems, strict=True)] for row in answers]
    counts = [sum(a != b for a, b in zip(*pair, strict=True)) for pair in (answers, grades)]
    print(f"{label}: {changed} texts, {counts[0]} answers, {counts[1]} grades of {prompts} differ", flush=True)


f32, bf16 = torch.float32, torch.bfloat16
for dtype in (f32, bf16):
    model = load_system1(name, torch.device("cpu"), dtype)
    for loop in (ours, theirs):
        for batch_size in (1, prompts):
            start = time.monotonic()
            texts[dtype, loop, batch_size] = [text(row) for row in loop(model, batch_size)]
            print(f"{dtype} {loop.__name__} batch {batch_size}: {time.monotonic() - start:.0f} s", flush=True)
        compare(f"{dtype} {loop.__name__}, batch 1 and {prompts}", (dtype, loop, 1), (dtype, loop, prompts))
    compare(f"{dtype}, ours and generate, batch 1", (dtype, ours, 1), (dtype, theirs, 1))
for batch_size in (1, prompts):
    compare(f"ours, float32 and bfloat16, batch {batch_size}", (f32, ours, batch_size), (bf16, ours, batch_size))
