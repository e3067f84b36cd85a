"""Greedy text of a dequantised GGUF file, ours, against llama.cpp's own on the same file.

python -m experiments.surprises.gguf_text FILE.gguf [prompts=40] [tokens=100]; needs xllamacpp
"""

import json
import math
import sys
import urllib.request

import torch
import xllamacpp

from llm2.common.loading import load_system1, load_tokenizer
from llm2.tasks import load_task, read_problems

file, prompts, tokens = sys.argv[1], int((sys.argv[2:] or ["40"])[0]), int((sys.argv[3:] or ["100"])[0])
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = file, 2048, 1, 1
server = xllamacpp.Server(settings)
model, tokenizer = load_system1(file, torch.device("cpu")), load_tokenizer(file)


def write(ids):
    """llama.cpp's greedy tokens, each with the log-probabilities of the likeliest 20."""
    body = {"prompt": ids, "n_predict": tokens, "temperature": 0, "n_probs": 20, "cache_prompt": False}
    request = urllib.request.Request(
        f"{server.listening_address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    answer = json.load(urllib.request.urlopen(request))["completion_probabilities"]
    return [each["id"] for each in answer], [{t["id"]: t["logprob"] for t in each["top_logprobs"]} for each in answer]


equal = positions = same_top = same_set = beyond = 0
parted, distances = [], []
for problem in read_problems(load_task("svamp"), "test", prompts):
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": problem.question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    else:
        prompt = tokenizer(f"Question: {problem.question}\nAnswer:")["input_ids"]
    theirs, tops = write(prompt)
    with torch.inference_mode():  # their text, read by ours: each step is compared after the same prefix
        logits = model(torch.tensor([prompt + theirs]), use_cache=False, logits_to_keep=len(theirs) + 1).logits[0, :-1]
    logprobs = logits.log_softmax(-1)
    ours = logprobs.argmax(-1).tolist()
    first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    equal += first is None
    if first is not None:
        parted.append(first)
        beyond += logprobs[first, theirs[first]].item() < logprobs[first].max().item() + math.log(0.1)
    for row, top, chosen in zip(logprobs, tops, theirs, strict=True):
        plausible = set((row >= row.max() + math.log(0.1)).nonzero()[:, 0].tolist())
        kept = {token for token, logprob in top.items() if logprob >= max(top.values()) + math.log(0.1)}
        positions, same_set = positions + 1, same_set + (plausible == kept)
        same_top += row.argmax().item() == chosen
        distances.append(abs(row[chosen].item() - top[chosen]))
distances.sort()
print(
    f"texts equal: {equal} of {prompts}; the others part at tokens {sorted(parted)}, {beyond} outside our plausible set"
)
print(f"steps: {positions}; same top token {same_top / positions:.1%}; same plausible set {same_set / positions:.1%}")
print(f"|log-probability of llama.cpp's token|: median {distances[positions // 2]:.3f}, largest {distances[-1]:.2f}")
