"""Exploration's rollouts against `generate` of transformers, and vLLM's: as many continuations of the same prefixes.

The prefixes are those that exploration asks about: the plausible tokens of the forks of gold solutions. `generate` gets
them sorted by length, a full batch at a time, which is the best that can be done with it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from llm2.benchmarks.configs import RolloutBenchmark
from llm2.benchmarks.runner import BenchmarkCase, markdown_table, peak_memory, rows, run_interleaved, write_results
from llm2.common.chat import resolve_template
from llm2.common.loading import load_tokenizer, resolve_device
from llm2.exploration.engines import Request
from llm2.exploration.engines.local import LocalEngine
from llm2.exploration.engines.vllm import VllmEngine
from llm2.exploration.solutions import find_forks, load_problems, tokenize_solutions
from llm2.tasks import load_task

GENERATE, VLLM = "transformers generate", "vLLM in process"


def measure(config: RolloutBenchmark) -> str:
    """Time every case, write `config.output`, return the table."""
    tokenizer = load_tokenizer(config.model)
    own = LocalEngine(config, tokenizer)
    requests = requests_of(config, own)
    torch.manual_seed(config.seed)
    runs: dict[str, Callable[[], float]] = {
        GENERATE: lambda: generate(own.model, own.eos, tokenizer.pad_token_id, requests, config),
        "LLM2 rollouts": lambda: count(own.generate(requests)),
    }
    if config.vllm:
        vllm = VllmEngine(config, tokenizer)
        runs[VLLM] = lambda: count(from_cold(vllm, requests))
    cases = [
        BenchmarkCase(
            name=name,
            run=run,
            unit="tokens/s",
            batch_size=config.batch_size,
            ratio_to=None if name == GENERATE else GENERATE,
        )
        for name, run in runs.items()
    ]
    run_interleaved(cases, config.rounds, "rollouts")
    for case in cases:
        if case.name == VLLM:
            continue  # it works in processes of its own
        case.peak_mib = peak_memory(case.run, resolve_device(config.device))
    found = rows(cases)
    write_results(Path(config.output), config.rounds, found, config=vars(config), prefixes=len(requests))
    return f"{markdown_table(found)}\n\n{len(requests)} prefixes, {config.rollouts} continuations of each."


def requests_of(config: RolloutBenchmark, engine: LocalEngine) -> list[Request]:
    """Rollouts of every plausible token of the solutions' forks."""
    task = load_task(config.task)
    problems, _ = load_problems(task, config.split, config.problems)
    template = resolve_template(config.chat_template)
    solutions = tokenize_solutions(task, problems, engine.tokenizer, template, engine.eos)
    return [
        solution.rollout_request(fork.position, token, config.seed, range(config.rollouts))
        for solution, forks in zip(solutions, find_forks(engine, solutions), strict=True)
        for fork in forks
        for token in fork.tokens
        if token not in engine.eos
    ]


def from_cold(vllm: VllmEngine, requests: Sequence[Request]) -> list[list[list[int]]]:
    """Without what an earlier run has left in the prefix cache."""
    vllm.llm.reset_prefix_cache()
    return vllm.generate(requests)


def generate(
    model: PreTrainedModel, eos: Sequence[int], pad: int, requests: Sequence[Request], config: RolloutBenchmark
) -> float:
    """Tokens written, those behind an end-of-sequence token not counted."""
    prefixes = sorted((request.prompt for request in requests for _ in request.seeds), key=len)
    tokens = 0
    for first in range(0, len(prefixes), config.batch_size):
        batch = prefixes[first : first + config.batch_size]
        longest = max(map(len, batch))
        ids = torch.tensor([[pad] * (longest - len(prefix)) + prefix for prefix in batch], device=model.device)
        real = torch.tensor([[0] * (longest - len(prefix)) + [1] * len(prefix) for prefix in batch])
        written = model.generate(
            ids,
            attention_mask=real.to(model.device),
            max_new_tokens=config.max_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=list(eos),
            pad_token_id=pad,
        )[:, longest:]
        ended = torch.isin(written, torch.tensor(list(eos), device=model.device))
        tokens += int((ended.cumsum(-1) - ended.long() == 0).sum())  # up to the first end, that one included
    return tokens


def count(continuations: list[list[list[int]]]) -> float:
    return sum(len(tokens) for each in continuations for tokens in each)
