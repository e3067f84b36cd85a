"""Greedy texts with float16 copies of the weights (`float16_weights`) against float32's.

python -m experiments.surprises.float16_texts MODEL TASK SPLIT TEMPLATE [prompts=100] [tokens=60]; one thread
"""

import sys

import torch

from llm2 import LLM2
from llm2.common.chat import encode_chats, resolve_template
from llm2.decoding.decoder import Decoder
from llm2.tasks import load_task, read_problems

name, task, split, template = sys.argv[1:5]
prompts, tokens = (int((sys.argv[i : i + 1] or [default])[0]) for i, default in ((5, "100"), (6, "60")))
torch.set_num_threads(1)
task, llm2 = load_task(task), LLM2.from_pretrained(name, device="cpu")
problems = read_problems(task, split, prompts)
chats = [task.prompt(problem) for problem in problems]
ids = encode_chats(llm2.tokenizer, chats, resolve_template(template), generation_prompt=True)
texts = []
for float16_weights in (False, True):
    decoder = Decoder(llm2.system1, float16_weights=float16_weights)
    completions = decoder.decode(ids, max_new_tokens=tokens, eos=llm2.eos, batch_size=64)
    texts.append([llm2.tokenizer.decode(row.token_ids, skip_special_tokens=True) for (row,) in completions])
graded = [[task.grade([text], p.gold)[0] for text, p in zip(each, problems, strict=True)] for each in texts]
equal = sum(a == b for a, b in zip(*texts, strict=True))
answers = sum(a.answer == b.answer for a, b in zip(*graded, strict=True))
right = [sum(grade.correct for grade in each) for each in graded]
print(f"texts equal: {equal} of {len(problems)}; answers equal: {answers}; right: {right}")
