"""A trained verifier from a folder or the hub, ready to guide its System 1."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from llm2.common.loading import LOADING_ERRORS, first_line, is_local, resolve_dtype
from llm2.errors import UserError
from llm2.verifier.model import ProcessVerifier, ProcessVerifierConfig


def require_verifier(name: str) -> None:
    """Raise UserError, before anything slow, if a local verifier does not exist."""
    if is_local(name) and not (Path(name) / "config.json").is_file():
        raise UserError(
            f"verifier {name!r}: expected a folder with config.json, found none; "
            "`llm2 train` makes one (`bash scripts/train_verifier.sh`)"
        )


def verifier_config(name: str) -> ProcessVerifierConfig:
    """Raises UserError where a verifier has none that can be read."""
    require_verifier(name)
    try:
        return ProcessVerifierConfig.from_pretrained(name, local_files_only=is_local(name))
    except LOADING_ERRORS as error:
        raise UserError(f"verifier {name!r} could not be loaded: {first_line(error)}") from None


def trained_beta(name: str) -> float:
    """The beta that a verifier's training chose. Raises UserError if it chose none."""
    beta = verifier_config(name).beta
    if beta is None:
        raise UserError(f"beta: null, and verifier {name!r} names none: only training on soft targets chooses one")
    return beta


def load_verifier(
    name: str, device: torch.device, dtype: str, vocabulary: int, system1: PreTrainedModel | None = None
) -> ProcessVerifier:
    """A trained verifier in evaluation mode.

    Args:
        vocabulary: number of System 1's tokens; the verifier must embed as many.
        system1: a LoRA verifier shares its weights; `device` and `dtype` must then be System 1's.
    """
    require_verifier(name)
    # `auto` follows System 1: a verifier is trained, and stored, in float32.
    follow = dtype == "auto" and system1 is not None
    options = {"local_files_only": is_local(name), "dtype": system1.dtype if follow else resolve_dtype(dtype, device)}
    try:
        verifier = ProcessVerifier.from_pretrained(name, system1=system1, **options)
    except UserError as error:
        raise UserError(f"verifier {name!r}: {error}") from None
    except LOADING_ERRORS as error:
        raise UserError(f"verifier {name!r} could not be loaded: {first_line(error)}") from None
    embedded = verifier.get_input_embeddings().num_embeddings
    if embedded < vocabulary:
        raise UserError(
            f"verifier {name!r} embeds {embedded} tokens and System 1 has {vocabulary}: not made from this System 1"
        )
    return verifier.to(device).eval()
