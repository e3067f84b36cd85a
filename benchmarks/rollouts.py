"""Exploration's rollouts against transformers' `generate`, and optionally vLLM: as many rollouts of the same prefixes.

A prefix is a gold solution up to a fork, followed by a plausible token. `generate` gets prefixes and their rollouts
sorted by length in full batches, which suits it best.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from benchmarks.configs import RolloutBenchmark
from benchmarks.runner import BenchmarkCase, peak_memory, report, run_interleaved
from llm2.common.chat import resolve_template
from llm2.common.loading import load_tokenizer
from llm2.exploration.engines import Request
from llm2.exploration.engines.local import LocalEngine
from llm2.exploration.engines.vllm import VllmEngine
from llm2.exploration.solutions import find_forks, tokenize_solutions
from llm2.tasks import load_task

GENERATE, VLLM = "transformers generate", "vLLM in process"


def measure(config: RolloutBenchmark) -> str:
    """Measure every case, write `config.output`, return the table."""
    tokenizer = load_tokenizer(config.model)
    engine = LocalEngine(replace(config, float16_weights=False), tokenizer)
    requests = rollout_requests(config, engine)
    torch.manual_seed(config.seed)
    runs: dict[str, Callable[[], float]] = {
        GENERATE: lambda: generate(engine.model, engine.eos, tokenizer.pad_token_id, requests, config),
        "LLM2 rollouts": lambda: num_tokens(engine.generate(requests)),
    }
    if config.float16_weights:
        copies = LocalEngine(config, tokenizer)
        runs["LLM2 rollouts, float16 weights"] = lambda: num_tokens(copies.generate(requests))
    if config.vllm:
        vllm = VllmEngine(config, tokenizer)
        runs[VLLM] = lambda: num_tokens(generate_without_cache(vllm, requests))
    cases = [
        BenchmarkCase(name, run, "tokens/s", config.batch_size, ratio_to=None if name == GENERATE else GENERATE)
        for name, run in runs.items()
    ]
    run_interleaved(cases, config, "rollouts")
    for case in cases:
        if case.name != VLLM:  # it uses the memory of other processes
            case.peak_mib = peak_memory(case.run, engine.model.device)
    table = report(config, cases, prefixes=len(requests))
    return f"{table}\n\n{len(requests)} prefixes, {config.rollouts} rollouts of each."


def rollout_requests(config: RolloutBenchmark, engine: LocalEngine) -> list[Request]:
    """One request for every plausible token at the forks of the gold solutions."""
    task, template = load_task(config.task), resolve_template(config.chat_template)
    problems = task.problems(config.split, config.problems)
    solutions = tokenize_solutions(task, problems, engine.tokenizer, template, engine.eos)
    return [
        solution.rollout_request(fork.position, token, config.seed, range(config.rollouts))
        for solution, forks in zip(solutions, find_forks(engine, solutions), strict=True)
        for fork in forks
        for token in fork.tokens
        if token not in engine.eos
    ]


def generate_without_cache(vllm: VllmEngine, requests: Sequence[Request]) -> list[list[list[int]]]:
    """Drops the prefix cache, which earlier rounds have filled."""
    vllm.backend.llm.reset_prefix_cache()
    return vllm.generate(requests)


def generate(
    model: PreTrainedModel, eos: Sequence[int], pad: int, requests: Sequence[Request], config: RolloutBenchmark
) -> float:
    """Number of new tokens of `generate`, up to and including the first end-of-sequence token of each rollout."""
    sampling = {"do_sample": config.temperature > 0}
    if config.temperature > 0:
        sampling |= {"temperature": config.temperature, "top_k": 0, "top_p": config.top_p}
    prefixes = sorted((request.prompt for request in requests for _ in request.seeds), key=len)
    tokens = 0
    for first in range(0, len(prefixes), config.batch_size):
        batch = prefixes[first : first + config.batch_size]
        longest = max(map(len, batch))
        ids = torch.tensor([[pad] * (longest - len(prefix)) + prefix for prefix in batch], device=model.device)
        mask = torch.tensor([[0] * (longest - len(prefix)) + [1] * len(prefix) for prefix in batch])
        new = model.generate(
            ids,
            attention_mask=mask.to(model.device),
            max_new_tokens=config.max_new_tokens,
            eos_token_id=list(eos),
            pad_token_id=pad,
            **sampling,
        )[:, longest:]
        is_end = torch.isin(new, torch.tensor(list(eos), device=model.device))
        tokens += int((is_end.cumsum(-1) - is_end.long() == 0).sum())  # no end before the token
    return tokens


def num_tokens(continuations: list[list[list[int]]]) -> float:
    return sum(len(tokens) for rollouts in continuations for tokens in rollouts)
