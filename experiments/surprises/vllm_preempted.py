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

TOKENS = 40
model, verifier, (count, dtype, blocks) = (
    sys.argv[1],
    sys.argv[2],
    (sys.argv[3:] + ["64", "float32", "40"][len(sys.argv) - 3 :]),
)
tokenizer, task = load_tokenizer(model), load_task("svamp")
chats = [task.prompt(problem) for problem in read_problems(task, "test", int(count))]
prompts = encode_chats(tokenizer, chats, CHATML_PLAIN, generation_prompt=True) * 2
guidance = GuidanceConfig(alpha=0.1, beta=1.0, top_k=10)
system1 = load_system1(model, torch.device("cpu"), dtype)
system2 = ProcessVerifier.from_pretrained(verifier).to(system1.dtype).eval()
eos = eos_ids(system1, tokenizer)
decoders = {"plain": Decoder(system1), "guided": Decoder(system1, Guidance(verifier=system2, **vars(guidance)))}
options = {"max_new_tokens": TOKENS, "eos": eos, "batch_size": 64}
ours = {name: [rows[0].token_ids for rows in decoder.decode(prompts, **options)] for name, decoder in decoders.items()}
del system1, system2, decoders

config = EvaluateConfig(
    model=model, task="svamp", output_dir="unused", device="cpu", dtype=dtype, max_model_len=256, memory_share=0.2
)
few = {"block_size": 32, "num_gpu_blocks_override": int(blocks), "max_num_seqs": 64, "disable_log_stats": False}
backend = InProcessBackend(config, verifier, 2, **few)
for name, asked in (("plain", {}), ("guided", {"extra_args": guidance_args(guidance)})):
    requests = [{"temperature": 0.0, "max_tokens": TOKENS, "stop_token_ids": sorted(eos), **asked}] * len(prompts)
    theirs = {index: answer.samples[0] for index, answer in backend.stream(prompts, requests)}
    equal = sum(theirs[index] == expected for index, expected in enumerate(ours[name]))
    metrics = {metric.name: metric.value for metric in backend.llm.get_metrics() if hasattr(metric, "value")}
    print(
        f"{dtype}, {name}: {equal} of {len(prompts)} texts equal ours; so far {metrics['vllm:num_preemptions']} "
        f"preemptions, {metrics['vllm:prefix_cache_hits']} of {metrics['vllm:prefix_cache_queries']} "
        "tokens from the cache",
        flush=True,
    )
backend.close()
