"""Interface of the engines that run System 1: plausible tokens and sampled continuations of prefixes.

Each engine is a module of its own, imported only if it is selected.
"""

import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from llm2.common.loading import resolve_device
from llm2.config import RolloutConfig
from llm2.decoding.linear import require_float16_weights
from llm2.decoding.processing import require_processor
from llm2.errors import UserError
from llm2.verifier.load import require_same_template, require_verifier, trained_beta
from llm2.vllm.backend import require_engine

Candidate = tuple[int, float]  # a token and its probability


class PositionQuery(NamedTuple):
    """Positions of a conversation at which to find the plausible tokens."""

    ids: Sequence[int]
    start: int  # first position, at least 1
    end: int  # one past the last


class Request(NamedTuple):
    """Continuations to sample after a prompt: the first `prefix_len` tokens of a shared prefix, then `token_ids`."""

    prefix: Sequence[int]  # one object in all requests that share it
    prefix_len: int
    token_ids: Sequence[int]
    seeds: Sequence[int]  # one per continuation, in [-2**63, 2**63)
    name: str = ""  # the problem's, for errors

    @property
    def prompt(self) -> list[int]:
        return [*self.prefix[: self.prefix_len], *self.token_ids]


Continuations = list[list[int]]  # new token ids of one request, in the order of its seeds
OnToken = Callable[[int, int], None]  # (index of a request, sample), once for each new token


def ignore(*_: Any) -> None:
    """A callback that does nothing."""


class Engine(ABC):
    """Runs System 1, locally or elsewhere."""

    eos: Sequence[int]  # tokens that end an answer
    window: int  # batches of continuations to keep queued in `stream`, so that no row is idle

    @abstractmethod
    def plausible(self, queries: Sequence[PositionQuery]) -> list[list[list[Candidate]]]:
        """The plausible tokens of each position of each query, likeliest first."""

    @abstractmethod
    def stream(self, requests: deque[Request], on_token: OnToken = ignore) -> Iterator[tuple[int, Continuations]]:
        """Yield (index of a request, its continuations, including an end-of-sequence token) when the request finishes.

        Takes requests from the queue, including those added while running; indices count all requests taken. Returns
        when the queue is empty and all requests are finished. `on_token` is called before a request finishes.
        """

    def generate(self, requests: Sequence[Request]) -> list[Continuations]:
        """The continuations of each request, in the order of the requests."""
        results = dict(self.stream(deque(requests)))
        return [results[index] for index in range(len(requests))]

    @abstractmethod
    def close(self) -> None:
        """Release memory, connections and processes."""


def check_engine(config: RolloutConfig) -> None:
    """Raise UserError if the keys do not fit the selected engine."""
    require_engine(config)
    require_float16_weights(config.float16_weights, resolve_device(config.device), config.dtype, config.engine)
    require_processor(config)
    if config.verifier is not None:
        require_verifier(config.verifier)
        require_same_template(config.verifier, config.model, config.chat_template)
        if config.beta is None:
            trained_beta(config.verifier)
    if config.engine == "vllm" and config.top_k is None:
        raise UserError("engine: vllm needs top_k (say 10; at most 20 on a server): it lists the likeliest tokens only")
    if config.stop_pattern is not None:
        if config.engine != "llm2":
            raise UserError(f"stop_pattern: found {config.stop_pattern!r} with engine {config.engine}, expected llm2")
        try:
            re.compile(config.stop_pattern)
        except re.error as error:
            raise UserError(f"stop_pattern: {config.stop_pattern!r} is no regular expression: {error}") from None


def open_engine(config: RolloutConfig, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """Open the selected engine. Raises UserError if vLLM, the model, the verifier or the server is not available."""
    if config.engine == "llm2":
        from llm2.exploration.engines.local import LocalEngine as EngineClass
    else:
        from llm2.exploration.engines.vllm import VllmEngine as EngineClass
    return EngineClass(config, tokenizer)
