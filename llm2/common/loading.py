"""Names -> loaded models and tokenizers, with a one-sentence error where one is missing.

A name is a local folder, a hub id, or `testbed` for the embedded System 1. Local folders never touch the network;
weights are safetensors; remote code is never run.
"""

from pathlib import Path

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import llm2
from llm2.errors import UserError

TESTBED = Path(llm2.__file__).parent / "testbed" / "system1"
# Of from_pretrained: no such file, no such model, broken weights.
LOADING_ERRORS = (OSError, ValueError, SafetensorError)
LOCAL_MODEL_HINT = "pass model=<local folder>, or model=testbed for the embedded one (`bash scripts/quickstart.sh`)"


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one. Raises UserError for `cuda` or `cuda:1` without a GPU."""
    has_gpu = torch.cuda.device_count() > 0  # unlike is_available it leaves CUDA alone: vLLM's GPUs are chosen later
    if name.startswith("cuda") and not has_gpu:
        raise UserError(f"device {name} needs a CUDA GPU and torch sees none; {LOCAL_MODEL_HINT} device=cpu")
    return torch.device(("cuda" if has_gpu else "cpu") if name == "auto" else name)


def resolve_dtype(name: str, device: torch.device) -> str | torch.dtype:
    """`auto` is the checkpoint's dtype on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, name)


def model_path(name: str) -> str:
    """The folder of the embedded System 1 for `testbed`, any other name unchanged."""
    return str(TESTBED) if name == "testbed" else name


def is_local(name: str) -> bool:
    """Whether a name is a path or `testbed`; a hub id has at most one slash (OWNER/NAME)."""
    return name == "testbed" or Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def require_model(name: str) -> None:
    """Raise UserError where a model's config cannot be loaded: a cheap check before heavy work."""
    _load(AutoConfig, name)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer = _load(AutoTokenizer, name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_system1(name: str, device: torch.device, dtype: str = "auto") -> PreTrainedModel:
    """The language model, in evaluation mode; `dtype` as for `resolve_dtype`."""
    return load_language_model(name, dtype=resolve_dtype(dtype, device)).to(device).eval()


def load_language_model(name: str, **options) -> PreTrainedModel:
    """The language model; `options` go to AutoModelForCausalLM.from_pretrained."""
    return _load(AutoModelForCausalLM, name, use_safetensors=True, **options)


def load_backbone(name: str, **options) -> PreTrainedModel:
    """The language model without its vocabulary-sized head; `options` go to AutoModel.from_pretrained."""
    return _load(AutoModel, name, use_safetensors=True, **options)


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All token ids that end an answer: those of the generation config and the tokenizer's."""
    return _eos_ids(model.generation_config, tokenizer)


def eos_ids_by_name(name: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`eos_ids` of a model that runs elsewhere: reads its configs, not its weights."""
    try:
        generation = GenerationConfig.from_pretrained(model_path(name), local_files_only=is_local(name))
    except OSError:  # no generation_config.json
        generation = GenerationConfig.from_model_config(_load(AutoConfig, name))
    return _eos_ids(generation, tokenizer)


def _eos_ids(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = generation.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({token for token in [*ids, tokenizer.eos_token_id] if token is not None})


def _load(auto_class, name: str, **options):
    """`auto_class.from_pretrained`. Raises UserError where there is no such model."""
    name = model_path(name)
    if is_local(name) and not Path(name).is_dir():
        raise UserError(f"model {name!r}: expected a folder with config.json, found none; {LOCAL_MODEL_HINT}")
    if not is_local(name) and not isinstance(try_to_load_from_cache(name, "config.json"), str):
        _probe_hub(name)
    try:
        return auto_class.from_pretrained(name, **{"local_files_only": is_local(name), **options})
    except LOADING_ERRORS as error:
        raise UserError(f"model {name!r} could not be loaded: {first_line(error)}; {LOCAL_MODEL_HINT}") from None


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _probe_hub(name: str) -> None:
    """One request with a short timeout: `from_pretrained` would retry for half a minute."""
    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # the errors of the hub client's transport share no base class
        problem = f"neither a local folder nor available from the hub ({type(error).__name__})"
        raise UserError(f"model {name!r} is {problem}; {LOCAL_MODEL_HINT}") from None
