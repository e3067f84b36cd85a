"""A trained verifier from a folder or the hub, ready to guide its System 1."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm2.common.architecture import backbone_class, refuse_undecodable
from llm2.common.chat import TEMPLATES, resolve_template
from llm2.common.config_file import read_values
from llm2.common.loading import is_local, load_tokenizer, model_path, resolve_dtype
from llm2.common.same_tokenizer import require_same_tokenizer
from llm2.errors import UserError, as_user_error
from llm2.verifier.model import ProcessVerifier, ProcessVerifierConfig


def require_verifier(name: str) -> None:
    """Raise UserError, before anything slow, if a local verifier does not exist."""
    if is_local(name) and not Path(model_path(name), "config.json").is_file():
        raise UserError(f"verifier {name!r}: expected a folder with config.json, found none; `llm2 train` makes one")


def require_same_template(verifier: str, model: str, chat_template: str | None) -> None:
    """Raise UserError where a verifier was trained with another chat template: its scores fit no other."""
    trained = trained_template(verifier)
    if trained is not None and trained != (resolve_template(chat_template) or load_tokenizer(model).chat_template):
        name = next((name for name, text in TEMPLATES.items() if text == trained), f"{verifier}/chat_template.jinja")
        raise UserError(
            f"chat_template: found {chat_template!r}, expected {name!r}: the verifier {verifier} was trained with it"
        )


def trained_template(verifier: str) -> str | None:
    """The chat template that a verifier was trained with, as its folder has it; None where it has none."""
    folder = model_path(verifier)
    trained = Path(folder, "train.yaml")
    name = read_values(trained).get("chat_template") if trained.exists() else None
    if name in TEMPLATES:
        return TEMPLATES[name]
    if is_local(verifier) and not Path(folder, "tokenizer_config.json").is_file():
        return None
    verifier_config(verifier)  # a folder that is none is an error that names it as the verifier
    return load_tokenizer(folder).chat_template


def verifier_config(name: str, **options) -> ProcessVerifierConfig:
    """The config of a verifier. Raises UserError if it is missing or unreadable."""
    require_verifier(name)
    options["local_files_only"] = is_local(name) or options.get("local_files_only", False)
    with as_user_error(f"verifier {name!r} could not be loaded"):
        content, _ = ProcessVerifierConfig.get_config_dict(model_path(name), **options)
        kind, expected = content.get("model_type"), ProcessVerifierConfig.model_type
        if kind != expected:  # transformers would only warn, and make up what is not there
            raise UserError(f"verifier {name!r}: config.json: key 'model_type': found {kind!r}, expected {expected!r}")
        if not isinstance(content.get("backbone_config"), dict):
            raise UserError(f"verifier {name!r}: config.json: key 'backbone_config': expected an object, found none")
        return ProcessVerifierConfig.from_pretrained(model_path(name), trust_remote_code=False, **options)


def trained_beta(name: str) -> float:
    """The beta that a verifier's training chose. Raises UserError if it chose none."""
    beta = verifier_config(name).beta
    if beta is None:
        raise UserError(f"beta: null, and verifier {name!r} names none: its training chose none")
    return beta


def load_verifier(
    name: str,
    device: torch.device,
    dtype: str | torch.dtype,
    vocabulary: int,
    system1: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options,
) -> ProcessVerifier:
    """A trained verifier in evaluation mode.

    Args:
        vocabulary: number of System 1's tokens; the verifier must embed as many.
        system1: a LoRA verifier shares its weights; `device` and `dtype` must then be System 1's.
        tokenizer: System 1's; of the folder that it was loaded from when None.
        options: of transformers' `from_pretrained` (cache_dir, token, ...).
    """
    backbone = verifier_config(name, **options).backbone_config
    refuse_undecodable(backbone_class(backbone), backbone, f"verifier {name!r} ({backbone.model_type}): ")
    if system1 is not None and is_local(name):
        require_same_tokenizer(f"verifier {name!r}", name, tokenizer or system1.name_or_path)
    # `auto` follows System 1: a verifier is trained, and stored, in float32.
    follow = dtype in ("auto", None) and system1 is not None
    options["dtype"] = system1.dtype if follow else resolve_dtype(dtype, device)
    try:
        with as_user_error("it could not be loaded"):
            verifier = ProcessVerifier.from_pretrained(model_path(name), system1=system1, **options)
    except UserError as error:
        raise UserError(f"verifier {name!r}: {error}") from error
    embedded = verifier.get_input_embeddings().num_embeddings
    if embedded < vocabulary:
        raise UserError(
            f"verifier {name!r} embeds {embedded} tokens and System 1 has {vocabulary}: not made from this System 1"
        )
    return verifier.to(device).eval()
