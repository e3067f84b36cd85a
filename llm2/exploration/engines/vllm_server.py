"""Rollouts by a vLLM server, through its OpenAI-compatible completions: token ids in, token ids out.

Tested with the server of vLLM 0.32.0 (`vllm serve MODEL`), which adds to the protocol what is needed here:
`prompt_logprobs` and `return_token_ids`. Many requests are in flight at once; what fails on the way is tried again.
"""

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

from transformers import PreTrainedTokenizerBase

from llm2.common.loading import end_ids
from llm2.config import ExploreConfig
from llm2.errors import UserError
from llm2.exploration.engines import Candidate, PositionQuery, Request
from llm2.exploration.engines.vllm import SEEDS, plausible_from_logprobs

ATTEMPTS = 6  # waits of 1, 2, 4, 8, 16 seconds between them: a server that restarts is back by then
WORTH_ANOTHER = {408, 409, 425, 429, 500, 502, 503, 504}  # HTTP statuses that pass
TIMEOUT = 600.0  # seconds for one answer, queueing at the server included


class ServerEngine:
    def __init__(self, config: ExploreConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.url = config, config.server.rstrip("/")
        self.eos = end_ids(config.model, tokenizer)
        self.served = self._served_name()
        self.pool = ThreadPoolExecutor(config.server_requests)

    def plausible(self, spans: Sequence[PositionQuery]) -> list[list[list[Candidate]]]:
        return list(self.pool.map(self._plausible, spans))

    def _plausible(self, span: PositionQuery) -> list[list[Candidate]]:
        options = {"max_tokens": 1, "prompt_logprobs": self.config.top_k, "temperature": 0}
        answer = self._complete(list(span.ids[: span.end]), options)
        found = answer["choices"][0]["prompt_logprobs"][span.start : span.end]
        return [
            plausible_from_logprobs([(int(token), entry["logprob"]) for token, entry in row.items()], self.config)
            for row in found
        ]

    def generate(
        self, requests: Sequence[Request], on_tokens: Callable[[int], None] = lambda count: None
    ) -> list[list[list[int]]]:
        found = []
        for continuations in self.pool.map(self._continue, requests):
            found.append(continuations)
            on_tokens(sum(map(len, continuations)))
        return found

    def _continue(self, request: Request) -> list[list[int]]:
        options = {
            "n": len(request.seeds),
            "seed": request.seeds[0] % SEEDS,
            "max_tokens": self.config.max_new_tokens,
            "temperature": self.config.temperature,
            "top_p": self.config.top_p,
            "stop_token_ids": list(self.eos),
            "return_token_ids": True,
        }
        answer = self._complete(request.prefix, options)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if any(choice.get("token_ids") is None for choice in choices):
            raise UserError(
                f"server: {self.url} answers without token ids; expected a vLLM server that knows `return_token_ids` "
                "(0.10.2 or newer)"
            )
        return [choice["token_ids"] for choice in choices]

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)

    def _served_name(self) -> str:
        """The server's name for the model: the config's own, or the only one that it serves."""
        names = [model["id"] for model in self._ask("/models", None)["data"]]
        if self.config.model not in names and len(names) != 1:
            raise UserError(
                f"server: {self.url} serves {', '.join(names)}; expected {self.config.model} to be among them"
            )
        return self.config.model if self.config.model in names else names[0]

    def _complete(self, prompt: list[int], options: dict) -> dict:
        return self._ask("/completions", {"model": self.served, "prompt": prompt, **options})

    def _ask(self, path: str, content: dict | None) -> dict:
        """One answer, tried for again where that may help. Raises UserError with the server's own words."""
        url = self.url + path
        body = None if content is None else json.dumps(content).encode()
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(2.0 ** (attempt - 1))
            try:
                with urlopen(HttpRequest(url, body, {"Content-Type": "application/json"}), timeout=TIMEOUT) as answer:
                    return json.load(answer)
            except HTTPError as error:
                reason = f"HTTP {error.code}: {error.read(500).decode(errors='replace').strip()}"
                if error.code not in WORTH_ANOTHER:
                    raise UserError(f"server: {url} refused a request: {reason}") from None
            except (
                URLError,
                HTTPException,
                OSError,
                ValueError,
            ) as error:  # refused, reset, timed out, plausible_from_logprobs off
                reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise UserError(f"server: no answer from {url} in {ATTEMPTS} attempts, the last: {reason}; is `vllm serve` up?")
