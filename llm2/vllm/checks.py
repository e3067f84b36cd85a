"""Checks of engine options and requests that guidance does not support. Does not import vllm."""

from typing import Any

import torch
from transformers import AutoModel

from llm2.config import GuidanceConfig
from llm2.decoding.memory import position_bytes
from llm2.errors import UserError
from llm2.verifier.load import trained_beta, verifier_config
from llm2.verifier.masks import sliding_window
from llm2.verifier.model import ProcessVerifierConfig
from llm2.vllm.core import MAX_BRANCHES
from llm2.vllm.plugin import ARCHITECTURES, PLUGIN
from llm2.vllm.prefix_head import check_fingerprint
from llm2.vllm.settings import (
    LOGITS_PROCESSOR,
    NO_PENALTY,
    PREFIX,
    PROCESSOR,
    TRANSFORMERS,
    engine_settings,
    request_guidance,
)

TESTED = "0.31 and 0.32"


def resolve_guidance(config: GuidanceConfig, verifier: str) -> GuidanceConfig:
    """The guidance, with the beta that training chose if none is given."""
    beta = trained_beta(verifier) if config.beta is None else config.beta
    return GuidanceConfig(alpha=config.alpha, top_k=config.top_k, beta=beta)


def check_rows(vllm_config: Any) -> None:
    """Raise UserError unless each row of logits is the next token of a request whose token ids are known."""
    model = vllm_config.model_config
    if vllm_config.speculative_config is not None:
        raise UserError("speculative_config: found one, expected none: one token per request is judged at a time")
    if model.enable_prompt_embeds:
        raise UserError("enable_prompt_embeds: found true, expected false: token ids are read")
    if getattr(vllm_config.parallel_config, "enable_batch_sharded_sampling", False):
        raise UserError("enable_batch_sharded_sampling: found true, expected false: a rank would lack some logits")


def check_order(model: Any) -> None:
    """Raise UserError where guidance comes before TransformersProcessor, whose logits the plausible set is made of."""
    names = _names(model)
    if PROCESSOR in names and names.index(PROCESSOR) < names.index(TRANSFORMERS):
        raise UserError(f"logits_processors: found {PROCESSOR} before {TRANSFORMERS}, expected it behind")
    if model.architectures[0].startswith(PLUGIN) and PROCESSOR not in names:
        raise UserError(f"logits_processors: found a model that guides before {TRANSFORMERS}, expected {PROCESSOR} too")


def check_engine(vllm_config: Any) -> None:
    """Raise UserError if guidance does not work with a `VllmConfig`."""
    settings, model = engine_settings(vllm_config.additional_config), vllm_config.model_config
    scheduler, system1 = vllm_config.scheduler_config, model.hf_text_config
    config = verifier_config(settings.verifier)
    backbone = config.backbone_config.get_text_config()
    check_rows(vllm_config)
    if model.is_multimodal_model:
        raise UserError(f"model {model.model}: found a multimodal model, expected text: System 2 reads text only")
    if scheduler.async_scheduling and not model.logits_processors and not vllm_config.use_v2_model_runner:
        raise UserError(
            "async_scheduling: found true with a processor that was loaded as a plug-in, which vLLM then does not show "
            "the last tokens; expected --no-async-scheduling or --logits-processors llm2.vllm:GuidedProcessor"
        )
    if backbone.vocab_size < system1.vocab_size:
        raise UserError(
            f"verifier {settings.verifier!r}: found {backbone.vocab_size} tokens, System 1 has {system1.vocab_size}; "
            "expected one made from this System 1"
        )
    window = sliding_window(backbone)
    if window is not None and window < model.max_model_len:
        raise UserError(
            f"max_model_len: found {model.max_model_len}, expected at most {window}, the sliding window of "
            f"{settings.verifier!r}, which was trained on texts up to that length"
        )
    check_kind(config, settings.verifier, model.architectures[0], model.model)
    if config.is_head and vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise UserError("pipeline_parallel_size: found more than 1, expected 1: a head needs states and embeddings")


def require_applied(vllm_config: Any) -> None:
    """Raise UserError if an engine's keys ask for something that neither a processor nor a model applies."""
    keys, model = vllm_config.additional_config, vllm_config.model_config
    own = {key for key in keys if str(key).startswith(PREFIX)} if isinstance(keys, dict) else set()
    if not own:
        return
    names = _names(model)
    if LOGITS_PROCESSOR in own and TRANSFORMERS not in names:
        raise UserError(
            f"additional_config: found {LOGITS_PROCESSOR} and nothing that applies it; expected --logits-processors "
            f"{TRANSFORMERS}"
        )
    if own == {LOGITS_PROCESSOR}:
        return
    by_model = model.architectures[0].startswith(PLUGIN) and engine_settings(keys).default is not None
    if not by_model and PROCESSOR not in names:
        raise UserError(
            f"additional_config: found {', '.join(map(str, keys))} and nothing that guides: every request would be "
            f"plain; expected --logits-processors {PROCESSOR}"
        )


def _names(model: Any) -> list[str]:
    """The engine's processors, ours as MODULE:CLASS whether they were given by name or as classes."""
    ours = {name.partition(":")[2]: name for name in (PROCESSOR, TRANSFORMERS)}
    given = [getattr(processor, "__name__", processor) for processor in model.logits_processors or ()]
    return [ours.get(name, name) for name in given]


def check_kind(config: ProcessVerifierConfig, name: str, architecture: str, model: str) -> None:
    """Raise UserError unless a prefix head has a model that exposes its states and has its System 1's weights."""
    shows_states = architecture.startswith(PLUGIN)
    if not config.is_head and shows_states:
        raise UserError(f"verifier {name!r}: found no prefix head, expected one with the architecture {architecture}")
    if config.is_head and not shows_states:
        raise UserError(
            f"verifier {name!r}: found a prefix head and the architecture {architecture}, which does not show "
            f"its states; expected hf_overrides with one of {', '.join(PLUGIN + known for known in ARCHITECTURES)}"
        )
    if config.is_head:
        check_fingerprint(model, name, config)


def check_request(params: Any) -> None:
    """Raise UserError for `SamplingParams` that guidance does not support."""
    if request_guidance(params.extra_args) is None:
        return
    for key, neutral in NO_PENALTY.items():
        if (found := getattr(params, key)) != neutral:
            raise UserError(
                f"{key}: found {found} with llm2_beta, expected {neutral}: vLLM's model runners apply penalties on "
                "different sides of guidance"
            )


def describe_memory(config: ProcessVerifierConfig, dtype: torch.dtype, num_slots: int, max_len: int) -> str:
    """A sentence with System 2's memory in bytes and the options to lower."""
    backbone = config.backbone_config.get_text_config()
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModel.from_config(backbone).parameters()) * dtype.itemsize
    cache = num_slots * (max_len + MAX_BRANCHES + 1) * position_bytes(backbone, dtype)
    merged = "; a LoRA verifier is merged at load, so it takes weights of its own here" if config.is_adapter else ""
    return (
        f"System 2 takes {weights / 2**20:,.0f} MiB of weights and {cache / 2**20:,.0f} MiB of cache for max_num_seqs="
        f"{num_slots} sequences of max_model_len={max_len} tokens; lower these two where memory is short{merged}"
    )
