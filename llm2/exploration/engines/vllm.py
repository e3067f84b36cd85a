"""Rollouts by vLLM, in this process with its prefix cache, or by a server.

Tested with vLLM 0.32.0. vLLM's random numbers differ from the local engine's: qualities agree within sampling error,
and single rollouts may differ between machines and batches.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from llm2.common.loading import eos_ids_by_name
from llm2.config import CandidateConfig, RolloutConfig
from llm2.decoding.candidates import plausible
from llm2.exploration.engines import Candidate, Continuations, Engine, OnToken, PositionQuery, Request, ignore
from llm2.vllm.backend import SEEDS, open_backend
from llm2.vllm.checks import resolve_guidance
from llm2.vllm.settings import guidance_args


class VllmEngine(Engine):
    """System 1 in vLLM, in this process or on a server."""

    window = 8  # all in one round; fewer would leave rows idle at its end

    def __init__(self, config: RolloutConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.eos = config, eos_ids_by_name(config.model, tokenizer)
        self.backend = open_backend(config, config.verifier, max_logprobs=config.top_k)
        self.extra_args = {}
        if config.verifier is not None:
            self.extra_args = guidance_args(resolve_guidance(config, config.verifier))

    def plausible(self, queries: Sequence[PositionQuery]) -> list[list[list[Candidate]]]:
        options = {"max_tokens": 1, "prompt_logprobs": self.config.top_k, "temperature": 0}
        prompts = [query.ids[: query.end] for query in queries]
        answers = dict(self.backend.stream(prompts, [options] * len(queries)))
        return [
            [
                plausible_from_logprobs(answers[index].prompt_logprobs[position - 1], self.config)
                for position in range(query.start, query.end)
            ]
            for index, query in enumerate(queries)
        ]

    def stream(self, requests: deque[Request], on_token: OnToken = ignore) -> Iterator[tuple[int, Continuations]]:
        """Run all queued requests at once; requests added meanwhile wait for the next round.

        Answers are yielded after a round, since the caller may ask for plausible tokens, which vLLM cannot do during
        one.
        """
        start = 0
        while requests:
            taken = list(requests)
            requests.clear()
            prompts, options = [request.prompt for request in taken], [self._options(request) for request in taken]
            finished = []
            for index, answer in self.backend.stream(prompts, options):
                finished.append((start + index, answer.samples))
                for sample, tokens in enumerate(answer.samples):
                    for _ in tokens:
                        on_token(start + index, sample)
            yield from finished
            start += len(taken)

    def _options(self, request: Request) -> dict:
        return {
            "n": len(request.seeds),
            "seed": request.seeds[0] % SEEDS,
            "max_tokens": self.config.max_new_tokens,
            "temperature": self.config.temperature,
            "top_p": self.config.top_p,
            "stop_token_ids": list(self.eos),
            "extra_args": self.extra_args,
        }

    def close(self) -> None:
        self.backend.close()


def plausible_from_logprobs(logprobs: Sequence[tuple[int, float]], config: CandidateConfig) -> list[Candidate]:
    """The plausible tokens of a position, likeliest first, from its likeliest tokens' (token, log probability).

    vLLM adds the prompt's token at that position, whatever its rank; alpha and top_k drop it if it is not plausible.
    """
    logprobs = sorted(logprobs, reverse=True)  # ties: the highest id first
    values = torch.tensor([[value for _, value in logprobs]], dtype=torch.float64)  # (1, n)
    columns, _ = plausible(values, config.alpha, config.top_k)
    return [(logprobs[i][0], math.exp(logprobs[i][1])) for i in columns[0].tolist()]
