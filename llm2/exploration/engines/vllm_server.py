"""Rollouts by a vLLM server, through its OpenAI-compatible completions: token ids in, token ids out.

Tested with the server of vLLM 0.32.0 (`vllm serve MODEL`), which adds `prompt_logprobs` and `return_token_ids` to the
protocol. Many requests are in flight at once; one that fails is sent again.
"""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

from transformers import PreTrainedTokenizerBase

from llm2.common.loading import eos_ids_by_name
from llm2.config import RolloutConfig
from llm2.errors import UserError
from llm2.exploration.engines import Candidate, Continuations, OnFinished, PositionQuery, Request
from llm2.exploration.engines.vllm import plausible_from_logprobs, sampling_options

ATTEMPTS = 6  # waits of 1, 2, 4, 8, 16 seconds between them: a server that restarts is back by then
TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}  # HTTP statuses after which a request is sent again
TIMEOUT = 600.0  # seconds for one answer, queueing at the server included


class ServerEngine:
    def __init__(self, config: RolloutConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.url = config, config.server.rstrip("/")
        self.eos = eos_ids_by_name(config.model, tokenizer)
        self.model = self._model_name()
        self.pool = ThreadPoolExecutor(config.server_requests)

    def plausible(self, queries: Sequence[PositionQuery]) -> list[list[list[Candidate]]]:
        return list(self.pool.map(self._plausible, queries))

    def _plausible(self, query: PositionQuery) -> list[list[Candidate]]:
        options = {"max_tokens": 1, "prompt_logprobs": self.config.top_k, "temperature": 0}
        (choice,) = self._complete(query.ids[: query.end], options)
        return [
            plausible_from_logprobs([(int(token), entry["logprob"]) for token, entry in logprobs.items()], self.config)
            for logprobs in choice["prompt_logprobs"][query.start : query.end]
        ]

    def generate(
        self, requests: Sequence[Request], on_finished: OnFinished = lambda index, continuations: None
    ) -> list[Continuations]:
        results = []
        for index, continuations in enumerate(self.pool.map(self._continue, requests)):
            results.append(continuations)
            on_finished(index, continuations)
        return results

    def _continue(self, request: Request) -> Continuations:
        options = sampling_options(request, self.config, self.eos) | {"return_token_ids": True}
        choices = sorted(self._complete(request.prompt, options), key=lambda choice: choice["index"])
        if any(choice.get("token_ids") is None for choice in choices):
            raise UserError(
                f"server: {self.url} answers without token ids; expected a vLLM server that knows `return_token_ids` "
                "(0.10.2 or newer)"
            )
        return [choice["token_ids"] for choice in choices]

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)

    def _model_name(self) -> str:
        """The server's name for the model: the config's, or the only one that it serves."""
        names = [model["id"] for model in self._send("/models", None)["data"]]
        if self.config.model not in names and len(names) != 1:
            raise UserError(
                f"server: {self.url} serves {', '.join(names)}; expected {self.config.model} to be among them"
            )
        return self.config.model if self.config.model in names else names[0]

    def _complete(self, prompt: Sequence[int], options: dict) -> list[dict]:
        return self._send("/completions", {"model": self.model, "prompt": list(prompt), **options})["choices"]

    def _send(self, path: str, content: dict | None) -> dict:
        """One answer, with retries where they may help. Raises UserError that quotes the server."""
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
                if error.code not in TRANSIENT:
                    raise UserError(f"server: {url} refused a request: {reason}") from None
            except (URLError, HTTPException, OSError, ValueError) as error:  # refused, reset, timed out, cut off
                reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise UserError(f"server: no answer from {url} in {ATTEMPTS} attempts, the last: {reason}; is `vllm serve` up?")
