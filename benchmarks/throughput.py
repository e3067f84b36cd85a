"""Problems per second with trained systems: guided decoding against transformers' `generate` of System 1.

Solutions differ in length, so each batch of `generate` waits for its longest one; several batch sizes are tried.
"""

from collections.abc import Callable
from functools import partial

from benchmarks.configs import ThroughputBenchmark
from benchmarks.runner import BenchmarkCase, ratios, report, run_interleaved, spread
from llm2.common.chat import encode_chats, resolve_template
from llm2.decoding.decoder import Decoder
from llm2.decoding.llm2 import LLM2
from llm2.tasks import load_task


def measure(config: ThroughputBenchmark) -> str:
    """Measure every case, write `config.output`, return the table."""
    llm2 = LLM2.from_pretrained(config.model, config.verifier, **config.guidance_kwargs(), device=config.device)
    task, template = load_task("testbed"), resolve_template(config.chat_template)
    chats = [task.prompt(problem) for problem in task.problems("test", config.problems)]
    prompts = encode_chats(llm2.tokenizer, chats, template, generation_prompt=True)
    runs: dict[tuple[str, int], Callable[[], float]] = {
        ("transformers generate, System 1 alone", batch_size): partial(generate, llm2, prompts, batch_size, config)
        for batch_size in config.generate_batch_sizes
    }
    for name, guidance in (("LLM2, no verifier", None), ("LLM2, guided", llm2.guidance)):
        runs[name, config.batch_size] = partial(decode, Decoder(llm2.system1, guidance), prompts, llm2.eos, config)
    cases = [BenchmarkCase(name, run, "problems/s", batch_size) for (name, batch_size), run in runs.items()]
    run_interleaved(cases, config, "problems")
    baselines = [case for case in cases if case.name.startswith("transformers")]
    batch_1 = next(case for case in baselines if case.batch_size == 1)
    best_batch = max(baselines, key=lambda case: spread(case.rates)["median"])
    for case in cases:
        case.extra["to_batch_1"] = spread(ratios(case.rates, batch_1.rates))["median"]
        case.extra["to_best_batch"] = spread(ratios(case.rates, best_batch.rates))["median"]
    return report(config, cases, ["to_batch_1", "to_best_batch"])


def generate(llm2: LLM2, prompts: list[list[int]], batch_size: int, config: ThroughputBenchmark) -> float:
    """Batches in the given order, as a user would run them; only `problems_one_by_one` at batch size 1."""
    if batch_size == 1:
        prompts = prompts[: config.problems_one_by_one]
    for first in range(0, len(prompts), batch_size):
        batch = {"input_ids": prompts[first : first + batch_size]}
        inputs = llm2.tokenizer.pad(batch, padding_side="left", return_tensors="pt")
        llm2.system1.generate(
            **inputs.to(llm2.system1.device),
            max_new_tokens=config.max_new_tokens,
            do_sample=False,
            eos_token_id=llm2.eos,
            pad_token_id=llm2.tokenizer.pad_token_id,
        )
    return len(prompts)


def decode(decoder: Decoder, prompts: list[list[int]], eos: list[int], config: ThroughputBenchmark) -> float:
    options = {"max_new_tokens": config.max_new_tokens, "eos": eos, "batch_size": config.batch_size}
    return len(decoder.decode(prompts, **options))
