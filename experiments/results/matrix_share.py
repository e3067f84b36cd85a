"""How much of our decoder's CPU time SmolLM2 spends in matrix products.

    PYTHONPATH=. python experiments/results/matrix_share.py   # one thread, some minutes

SVAMP's problems, greedy, prompts included.
"""

import torch
from torch.profiler import ProfilerActivity, profile

from llm2 import LLM2
from llm2.common.chat import encode_chats
from llm2.decoding.decoder import Decoder
from llm2.tasks import load_task

PRODUCTS = {"aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"}
WORK = (("float32", 64, 40), ("float32", 1, 60), ("bfloat16", 1, 60))  # dtype, rows, new tokens


def main() -> None:
    torch.set_num_threads(1)
    task = load_task("svamp")
    for dtype, rows, new in WORK:
        llm2 = LLM2.from_pretrained("smollm2", dtype=dtype, device="cpu")
        chats = [task.prompt(problem) for problem in task.problems("test", rows)]
        prompts = encode_chats(llm2.tokenizer, chats, generation_prompt=True)
        decoder = Decoder(llm2.system1)

        def ours(decoder=decoder, prompts=prompts, new=new) -> None:
            decoder.decode(prompts, max_new_tokens=new, eos=[], batch_size=len(prompts))

        ours()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            ours()
        spent = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
        share = sum(spent.get(key, 0) for key in PRODUCTS) / sum(spent.values())
        print(f"{dtype}, {rows} rows, {new} tokens: {share:.0%} in matrix products")


if __name__ == "__main__":
    main()
