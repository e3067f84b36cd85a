"""A prefix longer than a sliding window, with branches behind it: ours against transformers, on a model with windows.

python -m experiments.surprises.windows MODEL [length=600]; prints the largest differences of log-probabilities
"""

import sys

import torch

from llm2.common.loading import load_system1, load_tokenizer
from llm2.decoding.decoder import Decoder

name, length = sys.argv[1], int((sys.argv[2:] or ["600"])[0])
model, tokenizer = load_system1(name, torch.device("cpu")), load_tokenizer(name)
window = model.config.sliding_window
text = " ".join(f"Item {n} costs {n * 7 % 13} dollars and weighs {n * 5 % 11} pounds." for n in range(length))
ids = tokenizer(text)["input_ids"][:length]
with torch.inference_mode():
    whole = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        cached, cache = [], None
        for start, end in ((0, window - 3), (window - 3, window + 2), (window + 2, length)):
            output = model(torch.tensor([ids[start:end]]), past_key_values=cache, use_cache=True)
            cache, cached = output.past_key_values, [*cached, output.logits[0].log_softmax(-1)]
        difference = (torch.cat(cached) - whole).abs()
        print(f"transformers, {implementation}, three pieces: {difference.max().item():.1e}")
for start in (window - 4, length - 20):
    (ours,) = Decoder(model).decode([ids[:start]], max_new_tokens=20, eos=[])[0]
    prompt = torch.tensor([ids[:start]])
    theirs = model.generate(prompt, max_new_tokens=20, min_new_tokens=20, do_sample=False)[0, start:].tolist()
    print(f"greedy from {start}, window {window}: {'equal' if ours.token_ids == theirs else 'differ'}")
