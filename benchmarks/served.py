"""Tokens a second of guided and plain decoding, by vLLM and by our decoder, on the testbed or any model and task.

Every round has problems of its own, so that no prefix is warm.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

from benchmarks.configs import ServedBenchmark
from benchmarks.runner import BenchmarkCase, report, run_interleaved
from llm2.common.chat import encode_chats, resolve_template
from llm2.decoding.decoder import Decoder
from llm2.decoding.llm2 import LLM2
from llm2.tasks import load_task
from llm2.vllm.engine import InProcessBackend
from llm2.vllm.settings import guidance_args

PLAIN, GUIDED, VLLM_PLAIN, VLLM_GUIDED = "LLM2, no verifier", "LLM2, guided", "vLLM", "vLLM, guided"


def measure(config: ServedBenchmark) -> str:
    """Measure every case, write `config.output`, return the table."""
    llm2 = LLM2.from_pretrained(
        config.model, config.verifier, device=config.device, dtype=config.dtype, **config.guidance_kwargs()
    )
    task = load_task(config.task)
    problems = task.problems(config.split, config.problems * (config.rounds + 1))
    chats = [task.prompt(problem) for problem in problems]
    prompts = encode_chats(llm2.tokenizer, chats, resolve_template(config.chat_template), generation_prompt=True)
    rounds = [prompts[first : first + config.problems] for first in range(0, len(prompts), config.problems)]
    cases = []
    for batch_size in config.batch_sizes:
        vllm = InProcessBackend(config, config.verifier, 1, max_num_seqs=batch_size, enable_prefix_caching=False)
        plain, guided = Decoder(llm2.system1), Decoder(llm2.system1, llm2.guidance)
        options = {"max_new_tokens": config.max_new_tokens, "eos": llm2.eos, "batch_size": batch_size}
        request = {"max_tokens": config.max_new_tokens, "temperature": 0.0, "stop_token_ids": llm2.eos}
        runs: dict[str, tuple[Callable[[Sequence], int], str | None]] = {
            PLAIN: (partial(decode, plain, options), None),
            GUIDED: (partial(decode, guided, options), PLAIN),
            VLLM_PLAIN: (partial(stream, vllm, request), None),
            VLLM_GUIDED: (partial(stream, vllm, {**request, "extra_args": guidance_args(llm2.guidance)}), VLLM_PLAIN),
        }
        if config.float16_weights:
            for name, guidance in ((PLAIN, None), (GUIDED, llm2.guidance)):
                copies = Decoder(llm2.system1, guidance, float16_weights=True)
                runs[f"{name}, float16 weights"] = partial(decode, copies, options), PLAIN
        for name, (run, ratio_to) in runs.items():
            case = BenchmarkCase(name, in_turn(run, rounds), "tokens/s", batch_size, ratio_to)
            cases.append(case)
    run_interleaved(cases, config, "served")
    return report(config, cases)


def in_turn(run: Callable[[Sequence], int], rounds: Sequence[Sequence]) -> Callable[[], int]:
    """Each call runs the next round's prompts."""
    turn = count()
    return lambda: run(rounds[next(turn)])


def decode(decoder: Decoder, options: dict, prompts: Sequence[list[int]]) -> int:
    return sum(len(row.token_ids) for rows in decoder.decode(prompts, **options) for row in rows)


def stream(vllm: InProcessBackend, request: dict, prompts: Sequence[list[int]]) -> int:
    return sum(len(row) for _, answer in vllm.stream(prompts, [request] * len(prompts)) for row in answer.samples)
