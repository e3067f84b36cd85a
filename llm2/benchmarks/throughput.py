"""Problems a second with trained systems: guided decoding against transformers' `generate` of System 1 alone.

The problems are of mixed length, so `generate` waits in each batch for the longest answer; its best batch size is one
of several tried.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from transformers import BatchEncoding, PreTrainedTokenizerBase

from llm2.benchmarks.configs import ThroughputBenchmark
from llm2.benchmarks.runner import BenchmarkCase, markdown_table, rows, run_interleaved, spread, write_results
from llm2.common.chat import encode_chats, resolve_template
from llm2.decoding.decoder import Decoder
from llm2.decoding.llm2 import LLM2
from llm2.tasks import load_problems


def measure(config: ThroughputBenchmark) -> str:
    """Time `generate` at each batch size and ours at one, write `config.output`, return the table."""
    llm2 = LLM2.from_pretrained(
        config.model, config.verifier, device=config.device, alpha=config.alpha, beta=config.beta
    )
    problems = load_problems("testbed", "test", config.problems)
    template = resolve_template(config.chat_template)
    prompts = encode_chats(llm2.tokenizer, [each.prompt for each in problems], template, generation_prompt=True)
    runs: dict[tuple[str, int], Callable[[], float]] = {
        ("transformers generate, System 1 alone", size): partial(generate, llm2, prompts, size, config)
        for size in config.generate_batch_sizes
    }
    for name, decoder in {
        "LLM2, no verifier": Decoder(llm2.system1),
        "LLM2, guided": Decoder(llm2.system1, llm2.guidance),
    }.items():
        runs[name, config.batch_size] = partial(decode, decoder, prompts, llm2.eos, config)
    cases = [BenchmarkCase(name, run, "problems/s", size) for (name, size), run in runs.items()]
    run_interleaved(cases, config.rounds, "problems")
    theirs = [case for case in cases if case.name.startswith("transformers")]
    one = next(case for case in theirs if case.batch_size == 1)
    best = max(theirs, key=lambda case: spread(case.rates)["median"])
    for case in cases:
        for fact, other in (("to_batch_1", one), ("to_best_batch", best)):
            ratios = [own / base for own, base in zip(case.rates, other.rates, strict=True)]
            case.extra[fact] = spread(ratios)["median"]
    found = rows(cases)
    write_results(Path(config.output), config.rounds, found, config=vars(config))
    return markdown_table(found, ("to_batch_1", "to_best_batch"))


def generate(llm2: LLM2, prompts: list[list[int]], batch_size: int, config: ThroughputBenchmark) -> float:
    """In the order given, as a user would; at batch size 1 a part of the problems tells the rate."""
    some = prompts[: config.problems_one_by_one] if batch_size == 1 else prompts
    for first in range(0, len(some), batch_size):
        inputs = padded(llm2.tokenizer, some[first : first + batch_size])
        llm2.system1.generate(
            **inputs.to(llm2.system1.device),
            max_new_tokens=config.max_new_tokens,
            do_sample=False,
            eos_token_id=llm2.eos,
            pad_token_id=llm2.tokenizer.pad_token_id,
        )
    return len(some)


def padded(tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]) -> BatchEncoding:
    return tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")


def decode(decoder: Decoder, prompts: list[list[int]], eos: list[int], config: ThroughputBenchmark) -> float:
    written = decoder.decode(prompts, max_new_tokens=config.max_new_tokens, eos=eos, batch_size=config.batch_size)
    return len(written)
