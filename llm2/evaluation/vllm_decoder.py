"""vLLM as evaluation's decoder: the completions of prompts, plain or guided, greedy or sampled.

vLLM draws other random numbers than our engine: samples differ, distributions do not.
"""

import math
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from llm2.common.loading import eos_ids_by_name
from llm2.config import EvaluateConfig, Mode
from llm2.decoding.sampling import Completion, Guidance
from llm2.vllm.backend import SEEDS, Answer, open_backend
from llm2.vllm.settings import guidance_args

LIKELIEST = 2  # log-probabilities of each token that tell whether there was a choice


class VllmDecoder:
    def __init__(self, config: EvaluateConfig, guidance: Guidance | None, tokenizer: PreTrainedTokenizerBase) -> None:
        guided = any(mode.guided for mode in config.modes)
        self.config, self.guidance, self.eos = config, guidance, eos_ids_by_name(config.model, tokenizer)
        self.backend = open_backend(config, config.verifier if guided else None, LIKELIEST)

    def decode(
        self, mode: Mode, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, list[Completion]]]:
        """(index of a prompt, its completions), in the order in which they finish; as many as it has seeds."""
        options = {"temperature": 0.0}
        if mode.sampled:
            options = {"temperature": self.config.temperature, "top_p": self.config.top_p}
        if mode.guided:
            options |= {"extra_args": guidance_args(self.guidance), "logprobs": LIKELIEST}
        options |= {"max_tokens": self.config.max_new_tokens, "stop_token_ids": self.eos}
        requests = [options | {"n": len(row), "seed": row[0] % SEEDS} for row in seeds]
        for index, answer in self.backend.stream(prompts, requests):
            yield index, self._completions(answer)

    def _completions(self, answer: Answer) -> list[Completion]:
        """System 2 was called where at least two tokens were plausible."""
        margin = math.log(self.config.alpha) if self.config.alpha else -math.inf
        calls = [
            sum(sorted(values)[-2] >= max(values) + margin for values in sample) * (self.config.top_k != 1)
            for sample in answer.logprobs or [[]] * len(answer.samples)
        ]
        return [Completion(*pair) for pair in zip(answer.samples, calls, strict=True)]
