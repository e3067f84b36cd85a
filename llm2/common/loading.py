"""From a name to a loaded tokenizer or model, and the sentences said when something is missing.

A local folder never touches the network; weights are safetensors; remote code is never run.
"""

from pathlib import Path

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
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
WAY_OUT = "run `bash scripts/quickstart.sh` for the embedded testbed, or pass model=<local folder>"


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one; asking for one that is not there is a user's mistake."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"this config wants a CUDA GPU and torch sees none; {WAY_OUT} device=cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def require_model(name: str) -> None:
    """Say at once, before anything heavy, that a model cannot be had."""
    _load(AutoConfig, name)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer = _load(AutoTokenizer, name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_system1(name: str, device: torch.device, dtype: str = "auto") -> PreTrainedModel:
    """The language model, in evaluation mode. dtype `auto` is the checkpoint's own on a GPU and float32 on a CPU."""
    model = _load(AutoModelForCausalLM, name, dtype=resolve_dtype(dtype, device))
    return model.to(device).eval()


def load_backbone(name: str, **options) -> PreTrainedModel:
    """The language model without its vocabulary-sized head; `options` are those of AutoModel.from_pretrained."""
    return _load(AutoModel, name, **options)


def resolve_dtype(name: str, device: torch.device) -> str | torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, name)


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the generation config's and the tokenizer's own."""
    return _eos_ids(model.generation_config, tokenizer)


def end_ids(name: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`eos_ids` of a model that runs elsewhere: without its weights."""
    try:
        generation = GenerationConfig.from_pretrained(name, local_files_only=is_local(name))
    except OSError:  # no generation_config.json
        generation = GenerationConfig.from_model_config(_load(AutoConfig, name))
    return _eos_ids(generation, tokenizer)


def _eos_ids(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ends = generation.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({token for token in [*ends, tokenizer.eos_token_id] if token is not None})


def model_path(name: str) -> str:
    """The embedded System 1's folder for `testbed`, any other name as it is."""
    return str(TESTBED) if name == "testbed" else name


def is_local(name: str) -> bool:
    """A path rather than a hub id, which is OWNER/NAME at the longest."""
    return name == "testbed" or Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def _load(auto_class, name: str, **options):
    """`from_pretrained`, with one sentence in place of a traceback where the model is not to be had."""
    name = model_path(name)
    if is_local(name) and not Path(name).is_dir():
        raise UserError(f"model {name!r}: expected a folder with config.json, found none; {WAY_OUT}")
    if not is_local(name) and not isinstance(try_to_load_from_cache(name, "config.json"), str):
        _probe_hub(name)
    try:
        return auto_class.from_pretrained(name, **{"local_files_only": is_local(name), **options})
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model {name!r} could not be loaded: {reason}; {WAY_OUT}") from None


def _probe_hub(name: str) -> None:
    """One request with a short time limit: `from_pretrained` itself would try again for half a minute."""
    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # the hub client's transport errors share no base class of their own
        raise UserError(
            f"model {name!r} is neither a local folder nor to be had from the hub ({type(error).__name__}); {WAY_OUT}"
        ) from None
