"""How many plausible tokens (alpha 0.1) a model has along its own greedy and along gold solutions, by kind of token.

python -m experiments.surprises.forks MODEL TASK SPLIT [problems=50] [template=chatml-plain]
"""

import re
import sys
from collections import Counter

import torch

from llm2.common.chat import encode_chats, resolve_template
from llm2.common.loading import eos_ids, load_system1, load_tokenizer
from llm2.decoding.candidates import plausible
from llm2.decoding.decoder import Decoder
from llm2.tasks import load_task, read_problems

name, task, split = sys.argv[1], load_task(sys.argv[2]), sys.argv[3]
model, tokenizer = load_system1(name, torch.device("cpu")), load_tokenizer(name)
template, eos = resolve_template((sys.argv[5:] or ["chatml-plain"])[0]), eos_ids(model, tokenizer)
problems = read_problems(task, split, int((sys.argv[4:] or ["50"])[0]))
prompts = encode_chats(tokenizer, [task.prompt(each) for each in problems], template, generation_prompt=True)
whole = encode_chats(tokenizer, [task.conversation(each) for each in problems], template)
own = [each[0].token_ids for each in Decoder(model).decode(prompts, max_new_tokens=100, eos=eos, batch_size=16)]
gold = [ids[len(prompt) :] for ids, prompt in zip(whole, prompts, strict=True)]
gold = [ids[: next((i + 1 for i, token in enumerate(ids) if token in eos), len(ids))] for ids in gold]


def kind(token: int) -> str:
    text = tokenizer.decode([token])
    return "digits" if re.search(r"\d", text) else "words" if re.search(r"\w", text) else "signs"


for label, solutions in (("own greedy", own), ("gold", gold)):
    counts, forks, outside, total, by_position = Counter(), Counter(), 0, 0, Counter()
    for prompt, solution in zip(prompts, solutions, strict=True):
        with torch.inference_mode():
            ids = torch.tensor([prompt + solution])
            logits = model(ids, use_cache=False, logits_to_keep=len(solution) + 1).logits[0, :-1]
        candidates, valid = plausible(logits, 0.1, None)
        for position, (token, row, kept) in enumerate(zip(solution, candidates, valid, strict=True)):
            size, where = int(kept.sum()), "first" if position == 0 else "2 to 4" if position < 4 else "later"
            counts[kind(token)] += 1
            forks[kind(token)] += size > 1
            by_position[where] += 1
            forks[where] += size > 1
            total += size
            outside += token not in row[kept].tolist()
    n = sum(counts.values())
    shares = ", ".join(f"{key} {forks[key] / many:.1%} of {many}" for key, many in (counts + by_position).items())
    print(
        f"{label}: {n} tokens, forks {sum(forks[k] for k in counts) / n:.1%}, {total / n:.2f} plausible each; {shares}"
    )
    print(f"    the solution's own token is not plausible at {outside / n:.1%}")
