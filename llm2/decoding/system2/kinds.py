"""Which kind of System 2 a verifier is."""

from collections import Counter
from collections.abc import Iterable

from transformers import PreTrainedModel

from llm2.decoding.cuda_graphs import CUDAGraphs
from llm2.decoding.kv_cache import SlotCache
from llm2.decoding.model_runner import VerifierRunner
from llm2.decoding.system2 import System2
from llm2.decoding.system2.contrast import ContrastRunner
from llm2.decoding.system2.head import Head
from llm2.decoding.system2.reader import Reader
from llm2.verifier.model import ProcessVerifier

Kind = ProcessVerifier | PreTrainedModel | System2  # a verifier; a language model for contrast; any other kind


def is_adapter(verifier: Kind) -> bool:
    """Whether it can share System 1's forwards."""
    return isinstance(verifier, ProcessVerifier) and verifier.config.is_adapter


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
