"""vLLM with few blocks and prefix caching, plain and guided, against our decoder: every prompt twice, greedy.

python -m experiments.surprises.vllm_preempted MODEL VERIFIER [prompts=64] [float32 or bfloat16] [blocks=40]; needs vLLM
"""

import sys

import torch

from llm2.common.chat import CHATML_PLAIN, encode_chats
from llm2.common.loading import eos_ids, load_system1, load_tokenizer
from llm2.config import EvaluateConfig, GuidanceConfig
from llm2.decoding.decoder import Decoder
from llm2.decoding.sampling import Guidance
from llm2.tasks import load_task, read_problems
from llm2.verifier.model import ProcessVerifier
from llm2.vllm.engine import InProcessBackend
from llm2.vllm.settings import guidance_args

GUIDANCE, TOKENS = GuidanceConfig(alpha=0.1, beta=1.0, top_k=10), 40
SIZES = {"block_size": 32, "max_num_seqs": 64, "disable_log_stats": False}


def write_ours(model: str, verifier: str, dtype: str, prompts: list[list[int]]) -> tuple[dict, list[int]]:
    """Token ids of each prompt, plain and guided, and the ids that end a text."""
    system1 = load_system1(model, torch.device("cpu"), dtype)
    system2 = ProcessVerifier.from_pretrained(verifier).to(system1.dtype).eval()
    eos = sorted(eos_ids(system1, load_tokenizer(model)))
    guidance = Guidance(verifier=system2, **GUIDANCE.guidance_kwargs())
    decoders = {"plain": Decoder(system1), "guided": Decoder(system1, guidance)}
    options = {"max_new_tokens": TOKENS, "eos": eos, "batch_size": 64}
    return {name: [row.token_ids for (row,) in each.decode(prompts, **options)] for name, each in decoders.items()}, eos


def main(model: str, verifier: str, count: str = "64", dtype: str = "float32", blocks: str = "40") -> None:
    task = load_task("svamp")
    chats = [task.prompt(problem) for problem in read_problems(task, "test", int(count))]
    prompts = encode_chats(load_tokenizer(model), chats, CHATML_PLAIN, generation_prompt=True) * 2
    ours, eos = write_ours(model, verifier, dtype, prompts)
    names = {"model": model, "task": "svamp", "output_dir": "unused"}
    config = EvaluateConfig(**names, device="cpu", dtype=dtype, max_model_len=256, memory_share=0.2)
    backend = InProcessBackend(config, verifier, 2, **SIZES, num_gpu_blocks_override=int(blocks))
    for name, asked in (("plain", {}), ("guided", {"extra_args": guidance_args(GUIDANCE)})):
        requests = [{"temperature": 0.0, "max_tokens": TOKENS, "stop_token_ids": eos, **asked}] * len(prompts)
        theirs = {index: answer.samples[0] for index, answer in backend.stream(prompts, requests)}
        equal = sum(theirs[index] == expected for index, expected in enumerate(ours[name]))
        metrics = {metric.name: metric.value for metric in backend.llm.get_metrics() if hasattr(metric, "value")}
        hits, asked_for = (metrics[f"vllm:prefix_cache_{key}"] for key in ("hits", "queries"))
        print(
            f"{dtype}, {name}: {equal} of {len(prompts)} texts equal ours; so far {metrics['vllm:num_preemptions']} "
            f"preemptions, {hits} of {asked_for} tokens from the cache",
            flush=True,
        )
    backend.close()


if __name__ == "__main__":  # vLLM starts processes that import this module
    main(*sys.argv[1:])
