"""One sequence at a time on a CPU: ours, transformers' `generate` and, where xllamacpp is installed, llama.cpp.

    PYTHONPATH=. python experiments/results/single_stream.py [threads=1] [rounds=5]

SmolLM2-135M-Instruct (Q4_1; ours and transformers dequantise it), greedy, 60 new tokens behind a problem of SVAMP,
all cases in turn. Tokens/s over those of `generate` in float32: median and range over rounds.
"""

import json
import sys
import time
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec

import torch

from benchmarks.runner import ratios, spread
from llm2 import LLM2
from llm2.common.chat import encode_chats
from llm2.common.gguf import smollm2_file
from llm2.common.loading import load_tokenizer
from llm2.decoding.decoder import Decoder
from llm2.tasks import load_task

NEW = 60
GENERATE = "generate, float32"
threads, rounds = (int((sys.argv[i : i + 1] or [default])[0]) for i, default in ((1, "1"), (2, "5")))


def cases(prompt: list[int]) -> dict[str, Callable[[], None]]:
    found = {}
    for dtype in ("float32", "bfloat16"):
        llm2 = LLM2.from_pretrained("smollm2", dtype=dtype, device="cpu")
        decoders = {dtype: Decoder(llm2.system1)}
        if dtype == "float32":
            decoders["float16 weights"] = Decoder(llm2.system1, float16_weights=True)
        ids, options = torch.tensor([prompt]), {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        options |= {"max_new_tokens": NEW, "attention_mask": torch.ones_like(ids)}
        found[f"generate, {dtype}"] = lambda model=llm2.system1, ids=ids, options=options: model.generate(
            ids, **options
        )
        for name, decoder in decoders.items():
            found[f"ours, {name}"] = lambda decoder=decoder: decoder.decode([prompt], max_new_tokens=NEW, eos=[])
    if find_spec("xllamacpp"):
        found["llama.cpp, Q4_1"] = llama_cpp(prompt)
    return found


def llama_cpp(prompt: list[int]) -> Callable[[], None]:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(smollm2_file()), 1024, 1
    settings.cpuparams.n_threads = threads
    server = xllamacpp.Server(settings)
    options = {"n_predict": NEW, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
    body = json.dumps({"prompt": prompt, **options}).encode()

    def run() -> None:
        address = f"{server.listening_address}/completion"
        with urllib.request.urlopen(
            urllib.request.Request(address, body, {"Content-Type": "application/json"})
        ) as answer:
            assert json.load(answer)["tokens_predicted"] == NEW

    return run


def rate(run: Callable[[], None]) -> float:
    """Tokens/s."""
    start = time.perf_counter()
    run()
    return NEW / (time.perf_counter() - start)


def main() -> None:
    torch.set_num_threads(threads)
    task, tokenizer = load_task("svamp"), load_tokenizer("smollm2")
    (prompt,) = encode_chats(tokenizer, [task.prompt(task.problems("test", 1)[0])], generation_prompt=True)
    runs = cases(prompt)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            rates[name].append(rate(run))
    for name in runs:
        found = spread(ratios(rates[name], rates[GENERATE]))
        print(f"{name}: {found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})")


if __name__ == "__main__":
    main()
