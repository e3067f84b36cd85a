"""One interface to vLLM in this process or behind a URL: token ids and sampling parameters in, answers out as they
finish."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from llm2.config import EngineConfig
from llm2.errors import UserError

SEEDS = 2**31  # limit of seeds; vLLM adds up to n - 1 to them


class Answer(NamedTuple):
    """vLLM's output for one prompt."""

    samples: list[list[int]]  # new token ids
    logprobs: list[list[list[float]]]  # with `logprobs`, for each sample and token those of the likeliest tokens
    prompt_logprobs: list[
        list[tuple[int, float]]
    ]  # with `prompt_logprobs`, for each position but the first (token, value)


class Backend(Protocol):
    """vLLM in this process or behind a URL."""

    def stream(
        self, prompts: Sequence[Sequence[int]], options: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[int, Answer]]:
        """Yield (index of a prompt, its answer) in the order in which they finish.

        Args:
            options: arguments of vLLM's SamplingParams for each prompt.
        """

    def close(self) -> None:
        """Release memory, connections and processes."""


def require_engine(config: EngineConfig) -> None:
    """Raise UserError if `server` is set without engine=vllm, or is no URL."""
    if config.server is not None and config.engine != "vllm":
        raise UserError(f"server: found {config.server!r} with engine {config.engine}, expected engine vllm")
    if config.server is not None and not config.server.startswith(("http://", "https://")):
        raise UserError(f"server: found {config.server!r}, expected a URL such as http://HOST:8000/v1")


def open_backend(config: EngineConfig, verifier: str | None, max_logprobs: int) -> Backend:
    """Open vLLM. Raises UserError if vLLM, the model, the verifier or the server is not available, or cannot guide.

    Args:
        config: of a command that may run vLLM, with a model too.
        verifier: None for plain requests only.
    """
    if config.server is not None:
        from llm2.vllm.client import ServerBackend

        return ServerBackend(config.server, config.model, config.server_requests, guides=verifier is not None)
    from llm2.vllm.engine import InProcessBackend

    return InProcessBackend(config, verifier, max_logprobs, max_num_seqs=config.batch_size)
