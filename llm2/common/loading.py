"""Load models and tokenizers by name, with a one-sentence error if one is missing.

A name is a local folder, a GGUF file or `smollm2` (llm2/common/gguf.py), a hub id, or `testbed` for the embedded
System 1. Local folders never touch the network; weights are safetensors; remote code is never run.
"""

import logging
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import llm2
from llm2.common.architecture import backbone_class, refuse_undecodable
from llm2.common.distributed import dist_info
from llm2.common.gguf import gguf_folder
from llm2.errors import UserError, as_user_error, quote

NEWEST_TESTED = "5.24.0"  # of transformers; tests/README.md has all versions
TESTBED = Path(llm2.__file__).parent / "testbed" / "system1"
BUILT_IN = {"testbed": TESTBED, "testbed-verifier": TESTBED.parent / "verifier"}
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")  # where files are
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # of a CPU that multiplies in it: x86's two, ARM's
LARGE = 10_000_000  # parameters; far smaller ones gain nothing from it
Config = TypeVar("Config")  # one with the keys of ModelConfig, and of EngineConfig or OptimizerConfig
LOCAL_MODEL_HINT = "pass model=<local folder>, or model=testbed for the embedded one"


def resolve_device(device: str | int | torch.device) -> torch.device:
    """`auto` is the GPU if there is one, a number the GPU of that index.

    Raises UserError for an unknown device, and for `cuda` or `cuda:1` without a GPU.
    """
    name = f"cuda:{device}" if type(device) is int else str(device)
    has_gpu = torch.cuda.device_count() > 0  # is_available would initialize CUDA before vLLM's GPUs are chosen
    if name.startswith("cuda") and not has_gpu:
        raise UserError(f"device {name} needs a CUDA GPU and torch sees none; {LOCAL_MODEL_HINT} device=cpu")
    with as_user_error(f"device: found {quote(device)}, expected auto, cpu, cuda or such"):
        found = torch.device(("cuda" if has_gpu else "cpu") if name == "auto" else name)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name}: torch sees {torch.cuda.device_count()} GPUs, expected an index below that")
    return found


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> str | torch.dtype:
    """`auto`, or None, is the checkpoint's dtype on a GPU and float32 on a CPU.

    Raises UserError unless it is a floating-point dtype.
    """
    if dtype in ("auto", None):
        return torch.float32 if device.type == "cpu" else "auto"
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype: found {quote(dtype)}, expected auto, float32, bfloat16 or float16")
    return found


def with_batch_dtype(config: Config) -> Config:
    """The config of a command that decodes in batches, in which `auto` is bfloat16 where that is faster.

    Rollouts are 2.3 times as fast there, and a single sequence twice. What was decoded in float32 elsewhere is then of
    another config, and never mixed in.
    """
    chooses = config.dtype == "auto" and config.server is None and not config.float16_weights
    if not (why := chooses and _why_bfloat16(config)):
        return config
    logging.getLogger(__name__).info("dtype: bfloat16, for %s; with dtype=float32 no text depends on its batch", why)
    return replace(config, dtype="bfloat16")


def with_training_dtype(config: Config) -> Config:
    """The config of a command that trains, in which `bf16: auto` is true where mixed precision is faster on a CPU.

    A step of fine-tuning takes 0.42 of float32's time there (experiments/results/fine_tuning_step.py).
    """
    if config.bf16 != "auto":
        return config
    if why := _why_bfloat16(config):
        logging.getLogger(__name__).info("bf16: true, for %s; bf16=false trains in float32", why)
    return replace(config, bf16=bool(why))


def _why_bfloat16(config: Config) -> str:
    """Why a large model on a CPU that multiplies in bfloat16 is better off with it; empty for others."""
    local = resolve_device(config.device).type == "cpu"
    found = [key for key in BFLOAT16 if torch.cpu.get_capabilities().get(key)] if local else []
    if not found:
        return ""
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(load_config(config.model)).num_parameters()
    return f"{size / 1e6:,.0f} million parameters on a CPU with {found[0]}" if size > LARGE else ""


def is_gguf(name: str) -> bool:
    """Whether a name is a GGUF file, which is converted on first use."""
    return name == "smollm2" or name.endswith(".gguf")


def model_path(name: str) -> str:
    """The folder of a built-in name or a GGUF file; any other name unchanged."""
    if name in BUILT_IN:
        return str(BUILT_IN[name])
    return str(gguf_folder(name)) if is_gguf(name) else name


def is_local(name: str) -> bool:
    """Whether a name is a path or built in; a hub id has at most one slash (OWNER/NAME)."""
    is_path = Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    return name in BUILT_IN or is_gguf(name) or is_path


def require_model(name: str, decodes: bool = True, **options) -> None:
    """Raise UserError, before weights load, if a model's config cannot be loaded or its architecture is unsupported.

    Args:
        decodes: whether llm2's decoder or verifier will run it; vLLM supports more models.
        options: where its files are (`HUB`).
    """
    config = load_config(name, **{key: options[key] for key in HUB if key in options})
    kind = type(config)
    reads_both_ways = kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if config.is_encoder_decoder or reads_both_ways or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = config.model_type
        raise UserError(f"model {name!r}: expected a decoder-only language model, found a config of type {kind!r}")
    if decodes:
        refuse_undecodable(backbone_class(config), config, f"model {name!r} ({config.model_type}): ")


def changes_logits(config: PreTrainedConfig) -> str | None:
    """The key of a model's config that scales or caps the output layer's logits; None for most models."""
    text = config.get_text_config()
    keys = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    return next((key for key in keys if getattr(text, key, None) is not None), None)


def load_config(name: str, **options) -> PreTrainedConfig:
    return _load(AutoConfig, name, **options)


def vocabulary_size(name: str) -> int:
    """The vocabulary size in a model's config."""
    return load_config(name).get_text_config().vocab_size


def load_tokenizer(name: str, **options) -> PreTrainedTokenizerBase:
    """`options` go to AutoTokenizer.from_pretrained."""
    tokenizer = _load(AutoTokenizer, name, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_system1(
    name: str, device: torch.device, dtype: str | torch.dtype | None = "auto", **options
) -> PreTrainedModel:
    """The language model, in evaluation mode; `dtype` as for `resolve_dtype`, `options` as for load_language_model."""
    return load_language_model(name, dtype=resolve_dtype(dtype, device), **options).to(device).eval()


def load_language_model(name: str, **options) -> PreTrainedModel:
    """The language model; `options` go to AutoModelForCausalLM.from_pretrained."""
    require_model(name, **options)
    return _load_weights(AutoModelForCausalLM, name, **options)


def load_backbone(name: str, **options) -> PreTrainedModel:
    """The language model without its vocabulary-sized head; `options` go to AutoModel.from_pretrained."""
    require_model(name, **options)
    return _load_weights(AutoModel, name, **options)


def refuse_unknown_ids(ids: Iterable[int], model: PreTrainedModel, name: str) -> None:
    """Raise UserError if the tokenizer of `name` produced an id outside its model's vocabulary."""
    vocabulary, highest = model.get_input_embeddings().num_embeddings, max(ids, default=0)
    if highest >= vocabulary:
        raise UserError(
            f"the tokenizer of {name} writes the token {highest}, and its model has a vocabulary of {vocabulary}; "
            "expected a tokenizer and a model that belong together"
        )


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All token ids that end an answer: those of the generation config and the tokenizer's."""
    return _eos_ids(model.generation_config, tokenizer)


def eos_ids_by_name(name: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`eos_ids` of a model that is not loaded: only reads its configs."""
    try:
        generation = GenerationConfig.from_pretrained(model_path(name), local_files_only=is_local(name))
    except OSError:  # no generation_config.json
        generation = GenerationConfig.from_model_config(load_config(name))
    return _eos_ids(generation, tokenizer)


def _eos_ids(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = generation.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({token for token in [*ids, tokenizer.eos_token_id] if token is not None})


def _load(auto_class, name: str, **options):
    """`auto_class.from_pretrained`. Raises UserError if there is no such model."""
    name_newer_transformers()
    name = model_path(name)
    if is_local(name) and (subfolder := options.pop("subfolder", None)):
        name = str(Path(name, subfolder))
    if is_local(name) and not Path(name).is_dir():
        raise UserError(f"model {name!r}: expected a folder with config.json, found none; {LOCAL_MODEL_HINT}")
    cached = {key: options[key] for key in ("cache_dir", "revision") if options.get(key) is not None}
    file = f"{options.get('subfolder', '')}/config.json".lstrip("/")
    hub_alone = not is_local(name) and not options.get("local_files_only")
    if hub_alone and not isinstance(try_to_load_from_cache(name, file, **cached), str):
        _probe_hub(name, options.get("revision"), options.get("token"))
    with as_user_error(f"model {name!r} could not be loaded", LOCAL_MODEL_HINT):
        # trust_remote_code: if it is not given, transformers asks on the terminal
        return auto_class.from_pretrained(
            name, **{"trust_remote_code": False, **options, "local_files_only": not hub_alone}
        )


@cache
def name_newer_transformers() -> None:
    """Warn once, in the main process, that transformers is newer than the tested versions."""
    found, tested = (tuple(map(int, re.findall(r"\d+", v)[:3])) for v in (transformers.__version__, NEWEST_TESTED))
    if found > tested and dist_info().is_main:
        logging.getLogger("llm2").warning(
            "transformers %s is newer than %s, the newest that this llm2 was tested with",
            transformers.__version__,
            NEWEST_TESTED,
        )


def _load_weights(auto_class, name: str, **options) -> PreTrainedModel:
    return load_whole(partial(_load, auto_class, name), f"model {name!r}: its weights", **options)


def load_whole(load: Callable[..., tuple], what: str, new: Collection[str] = (), **options) -> PreTrainedModel:
    """Load a model by `load`; only the weights named in `new` may be missing from the files.

    Raises UserError, beginning with `what`, if weights are missing or misshapen. transformers' own log messages about
    missing and unused weights are suppressed during the load.
    """
    logger, held = logging.getLogger("transformers.modeling_utils"), []
    logger.addFilter(held.append)  # it returns None: the record is dropped
    try:
        options = {"use_safetensors": True, **options}
        model, found = load(output_loading_info=True, ignore_mismatched_sizes=True, **options)
    finally:
        logger.removeFilter(held.append)
    if other := sorted(found["mismatched_keys"]):
        key, shape, expected = other[0]
        raise UserError(f"{what} hold {key!r} of shape {[*shape]}, expected {[*expected]} as config.json says")
    if missing := sorted({*found["missing_keys"]} - {*new}):
        raise UserError(f"{what} do not hold {missing[0]!r}, expected all of the model, found {len(missing)} missing")
    for record in held:
        logger.handle(record)
    return model


def _probe_hub(name: str, revision: str | None, token: str | bool | None) -> None:
    """One request with a short timeout: `from_pretrained` would retry for half a minute."""
    try:
        HfApi().model_info(name, timeout=10, revision=revision, token=token)
    except Exception as error:  # errors of the hub client's transport share no base class
        problem = f"neither a local folder nor available from the hub ({type(error).__name__})"
        raise UserError(f"model {name!r} is {problem}; {LOCAL_MODEL_HINT}") from None
