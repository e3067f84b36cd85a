"""Client of a vLLM server's OpenAI-compatible completions: token ids in, token ids out.

Tested with the servers of vLLM 0.31 and 0.32, which add `prompt_logprobs`, `return_token_ids` and `vllm_xargs` to the
protocol. Many requests are in flight at once; failed ones are retried.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.client import HTTPException
from itertools import chain
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from llm2.common.loading import vocabulary_size
from llm2.errors import UserError, as_user_error, quote
from llm2.vllm.backend import Answer
from llm2.vllm.proof import PATH
from llm2.vllm.settings import NO_PENALTY

ATTEMPTS = 6  # with waits of 1, 2, 4, 8, 16 seconds, enough for a server to restart
TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}  # HTTP statuses to retry
TIMEOUT = 600.0  # seconds for one answer, including queueing at the server
# What a request does not say, a server takes from the model's generation_config.json; our engine does not.
NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, **NO_PENALTY}


class ServerBackend:
    """
    Args:
        url: including `/v1`.
        model: the server's name for it; any name if it serves only one model.
        max_requests: in flight.
        guides: refuse a server without `proof`, and raise if it guided fewer tokens than it wrote.
    """

    def __init__(self, url: str, model: str, max_requests: int, guides: bool) -> None:
        self.url = url.rstrip("/")
        self.vocabulary = vocabulary_size(model)
        self.model = self._model_name(model)
        self.pool = ThreadPoolExecutor(max_requests)
        if guides:
            self._guided_counts()

    def stream(
        self, prompts: Sequence[Sequence[int]], options: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[int, Answer]]:
        betas = [(request.get("extra_args") or {}).get("llm2_beta") for request in options]
        written, before = Counter(), self._guided_counts() if any(beta is not None for beta in betas) else {}
        futures = {
            self.pool.submit(self._answer, ids, request): index
            for index, (ids, request) in enumerate(zip(prompts, options, strict=True))
        }
        try:
            for future in as_completed(futures):
                answer = future.result()
                written[betas[futures[future]]] += sum(map(len, answer.samples))
                yield futures[future], answer
        finally:  # after an error Python would send all others before it exits
            for future in futures:
                future.cancel()
        if before:
            self._require_guided(before, written)

    def _answer(self, prompt: Sequence[int], options: Mapping[str, Any]) -> Answer:
        options = dict(options)
        if extra_args := options.pop("extra_args", None):
            options["vllm_xargs"] = extra_args
        fixed = {"model": self.model, "prompt": list(prompt), "return_token_ids": True}
        content = {**fixed, "return_tokens_as_token_ids": True, **NEUTRAL, **options}  # logprobs are keyed by text
        answer = self._send("/completions", content)
        with as_user_error(f"server: {self.url} answers {quote(answer)}", "expected a completion of vLLM's"):
            return self._read(answer, len(prompt), options)

    def _read(self, answer: dict, prompt_len: int, options: Mapping[str, Any]) -> Answer:
        """Raises UserError or ValueError if an answer does not fit the options, any exception if it is malformed."""
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if any(choice.get("token_ids") is None for choice in choices):
            raise UserError(
                f"server: {self.url} answers without token ids; expected a vLLM server that knows `return_token_ids` "
                "(0.10.2 or newer)"
            )
        samples = [choice["token_ids"] for choice in choices]
        if len(samples) != (wanted := options.get("n", 1)):
            raise ValueError(f"found {len(samples)} completions, expected {wanted}")
        for token in chain.from_iterable(samples):
            if type(token) is not int or not 0 <= token < self.vocabulary:
                raise ValueError(f"found the token {quote(token)}, expected one of the model's {self.vocabulary}")
        logprobs, prompt_logprobs = [], []
        if "logprobs" in options:
            logprobs = [[list(top.values()) for top in choice["logprobs"]["top_logprobs"]] for choice in choices]
            if [len(tops) for tops in logprobs] != [len(ids) for ids in samples]:
                raise ValueError("found log-probabilities of other tokens than those it wrote")
        if "prompt_logprobs" in options:
            prompt_logprobs = [
                [(int(token), entry["logprob"]) for token, entry in position.items()]
                for position in choices[0]["prompt_logprobs"][1:]
            ]
            if len(prompt_logprobs) != prompt_len - 1 or not all(prompt_logprobs):
                raise ValueError(f"found log-probabilities of {len(prompt_logprobs) + 1} tokens, expected {prompt_len}")
        values = chain(*chain(*logprobs), (value for position in prompt_logprobs for _, value in position))
        if not all(value <= 0 for value in values):  # NaN neither
            raise ValueError("found log-probabilities above 0 or NaN")
        return Answer(samples, logprobs, prompt_logprobs)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)

    def _model_name(self, model: str) -> str:
        """The server's name for the model: the config's, or the only one that it serves."""
        answer = self._send("/models", None)
        with as_user_error(f"server: {self.url}/models answers {quote(answer)}", "expected vLLM's list of models"):
            names = [str(entry["id"]) for entry in answer["data"]]
        if model not in names and len(names) != 1:
            raise UserError(f"server: {self.url} serves {', '.join(names)}; expected {model} to be among them")
        return model if model in names else names[0]

    def _guided_counts(self) -> dict[str, Any]:
        """The server's counts of guided tokens so far."""
        try:
            answer = self._send(PATH, None)
        except UserError as error:
            if "HTTP 404" not in str(error):
                raise
            raise UserError(
                f"server: {self.url} does not say what it guides ({PATH}: HTTP 404); "
                "expected one that `llm2 serve` started"
            ) from None
        with as_user_error(f"server: {self.url}{PATH} answers {quote(answer)}", "expected counts of llm2"):
            betas = {str(beta): int(tokens) for beta, tokens in answer["guided_tokens"].items()}
            return {"started": float(answer["started"]), "engines": int(answer["engines"]), "guided_tokens": betas}

    def _require_guided(self, before: dict[str, Any], written: Counter[float | None]) -> None:
        """Raise UserError if fewer tokens were guided with a beta than were generated with it.

        Only one of several engines reports, and counts restart with an engine: then only some must be guided.
        """
        now = self._guided_counts()
        same = now["started"] == before["started"]
        for beta, tokens in written.items():
            key = f"{beta:g}" if beta is not None else None
            grown = now["guided_tokens"].get(key, 0) - (before["guided_tokens"].get(key, 0) if same else 0)
            if key is not None and grown < (tokens if same and now["engines"] == 1 else min(1, tokens)):
                raise UserError(
                    f"server: {self.url} guided {grown} of {tokens} tokens that it wrote with llm2_beta={key}; "
                    "expected all: see its log"
                )

    def _send(self, path: str, content: dict | None) -> dict:
        """Send a request, with retries for transient errors. Raises UserError that quotes the server."""
        url = self.url + path
        body = None if content is None else json.dumps(content).encode()
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(2.0 ** (attempt - 1))
            try:
                with urlopen(Request(url, body, {"Content-Type": "application/json"}), timeout=TIMEOUT) as answer:
                    return json.load(answer)
            except HTTPError as error:
                reason = f"HTTP {error.code}: {error.read(500).decode(errors='replace').strip()}"
                if error.code not in TRANSIENT:
                    raise UserError(f"server: {url} refused a request: {reason}") from None
            except (URLError, HTTPException, OSError, ValueError) as error:  # refused, reset, timed out, cut off
                reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise UserError(f"server: no answer from {url} in {ATTEMPTS} attempts, the last: {reason}; is `vllm serve` up?")
