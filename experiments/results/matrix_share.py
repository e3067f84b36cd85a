"""How much of our decoder's CPU time SmolLM2 spends in matrix products, and a single stream against `generate`.

    PYTHONPATH=. python experiments/results/matrix_share.py   # one thread, some minutes

SVAMP's problems, greedy, prompts included. The ratio is the median of three, each of two runs in turn.
"""

import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

from llm2 import LLM2
from llm2.common.chat import encode_chats
from llm2.decoding.decoder import Decoder
from llm2.tasks import load_task

PRODUCTS = {"aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"}
WORK = (("float32", 64, 40), ("float32", 1, 60), ("bfloat16", 1, 60))  # dtype, rows, new tokens


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    task = load_task("svamp")
    for dtype, rows, new in WORK:
        system1, tokenizer = (
            (llm2 := LLM2.from_pretrained("smollm2", dtype=dtype, device="cpu")).system1,
            llm2.tokenizer,
        )
        chats = [task.prompt(problem) for problem in task.problems("test", rows)]
        prompts = encode_chats(tokenizer, chats, generation_prompt=True)
        decoder = Decoder(system1)

        def ours(decoder=decoder, prompts=prompts, new=new) -> None:
            decoder.decode(prompts, max_new_tokens=new, eos=[], batch_size=len(prompts))

        ours()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            ours()
        spent = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
        share = sum(spent.get(key, 0) for key in PRODUCTS) / sum(spent.values())
        print(f"{dtype}, {rows} rows, {new} tokens: {share:.0%} in matrix products")
        if rows == 1:
            ids = torch.tensor(prompts)
            options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

            def theirs(system1=system1, ids=ids, options=options) -> None:
                system1.generate(ids, attention_mask=torch.ones_like(ids), **options)

            theirs()
            ratios = [seconds(theirs) / seconds(ours) for _ in range(3)]
            print(
                f"  {statistics.median(ratios):.2f} times generate's tokens/s ({min(ratios):.2f} to {max(ratios):.2f})"
            )


if __name__ == "__main__":
    main()
