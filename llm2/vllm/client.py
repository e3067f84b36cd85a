"""A vLLM server, through its OpenAI-compatible completions: token ids in, token ids out.

Tested with the servers of vLLM 0.31 and 0.32, which add `prompt_logprobs`, `return_token_ids` and `vllm_xargs` to the
protocol. Many requests are in flight at once; one that fails is sent again.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.client import HTTPException
from itertools import chain
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from llm2.common.loading import vocabulary_size
from llm2.errors import UserError, explained, shown
from llm2.vllm.backend import Answer

ATTEMPTS = 6  # waits of 1, 2, 4, 8, 16 seconds between them: a server that restarts is back by then
TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}  # HTTP statuses after which a request is sent again
TIMEOUT = 600.0  # seconds for one answer, queueing at the server included


class ServerBackend:
    """
    Args:
        url: up to and with `/v1`.
        model: as the server calls it, unless it serves one model only.
        max_requests: in flight.
        guides: refuse a server that does not know guidance and would answer plainly.
    """

    def __init__(self, url: str, model: str, max_requests: int, guides: bool) -> None:
        self.url = url.rstrip("/")
        self.vocabulary = vocabulary_size(model)
        self.model = self._model_name(model)
        self.pool = ThreadPoolExecutor(max_requests)
        if guides:
            self._require_guidance()

    def stream(
        self, prompts: Sequence[Sequence[int]], options: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[int, Answer]]:
        futures = {
            self.pool.submit(self._answer, ids, request): index
            for index, (ids, request) in enumerate(zip(prompts, options, strict=True))
        }
        for future in as_completed(futures):
            yield futures[future], future.result()

    def _answer(self, prompt: Sequence[int], options: Mapping[str, Any]) -> Answer:
        options = dict(options)
        if extra_args := options.pop("extra_args", None):
            options["vllm_xargs"] = extra_args
        fixed = {"model": self.model, "prompt": list(prompt), "return_token_ids": True}
        content = {**fixed, "return_tokens_as_token_ids": True, **options}  # equal texts would collapse in logprobs
        answer = self._send("/completions", content)
        with explained(f"server: {self.url} answers {shown(answer)}", "expected a completion of vLLM's"):
            return self._read(answer, len(prompt), options)

    def _read(self, answer: dict, prompt_len: int, options: Mapping[str, Any]) -> Answer:
        """Raises whatever it stumbles over, and UserError or ValueError for an answer that is none to these options."""
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
                raise ValueError(f"found the token {shown(token)}, expected one of the model's {self.vocabulary}")
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
        with explained(f"server: {self.url}/models answers {shown(answer)}", "expected vLLM's list of models"):
            names = [str(entry["id"]) for entry in answer["data"]]
        if model not in names and len(names) != 1:
            raise UserError(f"server: {self.url} serves {', '.join(names)}; expected {model} to be among them")
        return model if model in names else names[0]

    def _require_guidance(self) -> None:
        """A request that guidance refuses: a server without it ignores the key and answers."""
        content = {"model": self.model, "prompt": [0], "max_tokens": 1, "vllm_xargs": {"llm2_beta": -1.0}}
        try:
            self._send("/completions", content)
        except UserError as error:
            if "llm2_beta" in str(error):
                return
            raise
        raise UserError(
            f"server: {self.url} does not guide; expected one that was started by `bash scripts/serve.sh`, or with "
            "--logits-processors llm2.vllm:GuidedProcessor"
        )

    def _send(self, path: str, content: dict | None) -> dict:
        """One answer, with retries where they may help. Raises UserError that quotes the server."""
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
