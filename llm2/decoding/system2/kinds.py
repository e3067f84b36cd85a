"""Which kind of System 2 a verifier is."""

from collections import Counter
from collections.abc import Iterable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from llm2.decoding.cuda_graphs import CUDAGraphs
from llm2.decoding.kv_cache import SlotCache
from llm2.decoding.model_runner import VerifierRunner
from llm2.decoding.system2 import System2
from llm2.decoding.system2.contrast import ContrastRunner
from llm2.decoding.system2.head import Head
from llm2.decoding.system2.reader import Reader
from llm2.errors import UserError
from llm2.verifier.heads import fingerprint, output_fingerprint
from llm2.verifier.model import ProcessVerifier

Kind = ProcessVerifier | PreTrainedModel | System2  # a verifier; a language model for contrast; any other kind


def is_adapter(verifier: Kind) -> bool:
    """Whether it can share System 1's forwards."""
    return isinstance(verifier, ProcessVerifier) and verifier.config.is_adapter


def require_pair(verifier: ProcessVerifier | PreTrainedModel, system1: PreTrainedModel, shared: bool) -> None:
    """Raise UserError where a verifier in memory, or a model for contrast, does not fit System 1.

    It must know all of its tokens; an adapter and a prefix head must be of its weights.
    """
    known, tokens = (model.get_input_embeddings().num_embeddings for model in (verifier, system1))
    if known < tokens:
        raise UserError(f"verifier: found {known:,} tokens, System 1 has {tokens:,}: not made from this System 1")
    if not isinstance(verifier, ProcessVerifier) or verifier.config.is_whole:
        return
    layers = {id(layer) for layer in verifier.backbone.modules() if isinstance(layer, BaseTunerLayer)}
    if any(id(layer) in layers for layer in system1.modules()):  # `from_language_model` of this very model
        if not shared:
            raise UserError("shared: found false, expected true: the verifier's adapter lies in System 1's own layers")
        return
    of_other = verifier.config.system1_fingerprint not in (None, fingerprint(system1.base_model))
    if verifier.config.output_fingerprint is not None:
        of_other |= verifier.config.output_fingerprint != output_fingerprint(system1)
    if of_other and system1.dtype != torch.float16:  # its rounding is not bfloat16's
        raise UserError("verifier: it is made for the weights of another System 1, and of no use to this one")
    if is_adapter(verifier) and shared and verifier.dtype != system1.dtype:
        raise UserError(f"verifier: found {verifier.dtype}, expected System 1's {system1.dtype}, or shared=False")


def runner_of(
    verifier: Kind, graphs: CUDAGraphs | None = None, float16_weights: bool = False
) -> VerifierRunner | ContrastRunner | None:
    """What reads tokens for it in forwards of its own; None for a kind that runs no model."""
    if isinstance(verifier, System2):
        return None
    if not isinstance(verifier, ProcessVerifier):
        return ContrastRunner(verifier, graphs, float16_weights)
    return None if verifier.config.is_head else VerifierRunner(verifier, graphs, float16_weights)


def open_system2(
    verifier: Kind,
    runner: VerifierRunner | ContrastRunner | None,
    cache: SlotCache,
    slots: Iterable[int],
    counts: Counter[str],
) -> System2:
    """A System 2 without sequences, which keeps what it reads in these slots of the cache."""
    if runner is not None:
        return Reader(runner, cache, slots, counts)
    return verifier if isinstance(verifier, System2) else Head(verifier.prefix_scores)
