"""Many sampled continuations of many prefixes by System 1: what an engine is asked, and which engines there are.

Knows the requests and the small interface that all engines share; each engine is a module of its own, loaded when it is
chosen. What the prefixes are and what the continuations are worth is the business of `exploration`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from llm2.config import ExploreConfig

Candidate = tuple[int, float]  # a token and its probability


class PositionQuery(NamedTuple):
    """A part of a conversation whose plausible tokens are asked for."""

    ids: Sequence[int]
    start: int  # first position asked about, at least 1
    end: int  # one past the last


class Request(NamedTuple):
    """Continuations of one prefix: the first `bound` tokens of a trunk that many share, and tokens of its own."""

    trunk: Sequence[int]
    bound: int
    own: Sequence[int]
    seeds: Sequence[int]  # one a continuation, in [-2**63, 2**63)

    @property
    def prefix(self) -> list[int]:
        return [*self.trunk[: self.bound], *self.own]


class Engine(Protocol):
    """System 1, wherever it runs."""

    eos: Sequence[int]  # tokens that end an answer

    def plausible(self, spans: Sequence[PositionQuery]) -> list[list[list[Candidate]]]:
        """For each position of each span its plausible tokens, the best first."""

    def generate(
        self, requests: Sequence[Request], on_tokens: Callable[[int], None] = lambda count: None
    ) -> list[list[list[int]]]:
        """For each request its continuations, new tokens only, the end-of-sequence token included where it was reached.

        `on_tokens` is told how many tokens were generated as requests finish, for a progress bar.
        """

    def close(self) -> None:
        """Give back what the engine holds: memory, connections, processes."""


def open_engine(config: ExploreConfig, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """Raises UserError where the engine, its model or its server cannot be had."""
    if config.engine == "vllm" and config.server is not None:
        from llm2.exploration.engines.vllm_server import ServerEngine

        return ServerEngine(config, tokenizer)
    if config.engine == "vllm":
        from llm2.exploration.engines.vllm import VllmEngine

        return VllmEngine(config, tokenizer)
    from llm2.exploration.engines.local import LocalEngine

    return LocalEngine(config, tokenizer)
