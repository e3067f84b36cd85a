"""Decode with vLLM in evaluation: completions of prompts, plain or guided, greedy or sampled.

vLLM's random numbers differ from those of our engine, so samples differ; distributions do not.
"""

import math
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from llm2.common.loading import eos_ids_by_name
from llm2.config import EvaluateConfig, Mode
from llm2.decoding.sampling import Completion, Guidance
from llm2.vllm.backend import SEEDS, Answer, open_backend
from llm2.vllm.settings import guidance_args

LIKELIEST = 8  # log-probabilities per token, from which candidates are counted, so at most this many are counted


class VllmDecoder:
    """Decodes with vLLM, in process or on a server, in place of `Decoder`."""

    def __init__(self, config: EvaluateConfig, guidance: Guidance | None, tokenizer: PreTrainedTokenizerBase) -> None:
        guided = any(mode.guided for mode in config.modes)
        self.config, self.guidance, self.eos = config, guidance, eos_ids_by_name(config.model, tokenizer)
        self.backend = open_backend(config, config.verifier if guided else None, LIKELIEST)

    def decode(
        self, mode: Mode, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (index of a prompt, its completions, one per seed) in the order in which prompts finish."""
        options = {"temperature": 0.0}
        if mode.sampled:
            options = {"temperature": self.config.temperature, "top_p": self.config.top_p}
        if mode.guided:
            options |= {"extra_args": guidance_args(self.guidance), "logprobs": LIKELIEST}
        options |= {"max_tokens": self.config.max_new_tokens, "stop_token_ids": self.eos}
        requests = [options | {"n": len(row), "seed": row[0] % SEEDS} for row in seeds]
        for index, answer in self.backend.stream(prompts, requests):
            yield index, self._completions(len(prompts[index]), answer)

    def _completions(self, prompt_len: int, answer: Answer) -> list[Completion]:
        counts = [[self._num_candidates(values) for values in sample] for sample in answer.logprobs]
        counts = counts or [[]] * len(answer.samples)
        return [
            Completion(ids, *self._read(prompt_len, sizes)) for ids, sizes in zip(answer.samples, counts, strict=True)
        ]

    def _num_candidates(self, logprobs: Sequence[float]) -> int:
        """Count candidates in the log-probabilities of the likeliest tokens and of the chosen token."""
        threshold = max(logprobs) + math.log(self.config.alpha)
        plausible = sum(value >= threshold for value in logprobs)
        return min(plausible, self.config.top_k or plausible)

    def _read(self, prompt_len: int, num_candidates: Sequence[int]) -> tuple[int, int]:
        """System 2's forwards and tokens: one forward per choice; shared prefixes are counted for each sequence."""
        choices = [at for at, count in enumerate(num_candidates) if count > 1]
        if not choices or self.guidance.verifier.config.is_head:
            return 0, 0
        reads_candidates = self.guidance.verifier.config.reads_candidates
        branches = sum(num_candidates[at] for at in choices) if reads_candidates else 0
        return len(choices), prompt_len + choices[-1] + branches
