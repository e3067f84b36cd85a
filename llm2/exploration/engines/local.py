"""Rollouts by this project's decoder: rows leave and join a batch that stays full.

In float32 a continuation depends on its prompt and its seed alone, never on what else is in the batch.
"""

import math
import re
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from llm2.common.architecture import refuse_too_long
from llm2.common.distributed import process_device
from llm2.common.loading import eos_ids, load_system1, refuse_unknown_ids, resolve_device
from llm2.config import RolloutConfig
from llm2.decoding.candidates import plausible
from llm2.decoding.decoder import Decoder
from llm2.decoding.sampling import Guidance, SamplingParams
from llm2.errors import UserError
from llm2.exploration.engines import Candidate, Continuations, OnFinished, OnToken, PositionQuery, Request, ignore
from llm2.verifier.load import load_verifier, trained_beta

STOP_EVERY = 8  # tokens between searches for the stop pattern


class LocalEngine:
    def __init__(self, config: RolloutConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        device = process_device(resolve_device(config.device))
        self.config, self.tokenizer = config, tokenizer
        self.model = load_system1(config.model, device, config.dtype)
        self.decoder = Decoder(self.model, self._guidance(device))
        self.eos = eos_ids(self.model, tokenizer)
        greedy = config.temperature == 0
        self.sampling = None if greedy else SamplingParams(temperature=config.temperature, top_p=config.top_p)

    def _guidance(self, device: torch.device) -> Guidance | None:
        """How a verifier takes part in the continuations; it has no part in which tokens are plausible."""
        name, vocabulary = self.config.verifier, self.model.get_input_embeddings().num_embeddings
        if name is None:
            return None
        settings = self.config.guidance()
        if self.config.beta is None:
            settings["beta"] = trained_beta(name)
        return Guidance(verifier=load_verifier(name, device, self.config.dtype, vocabulary, self.model), **settings)

    def plausible(self, queries: Sequence[PositionQuery]) -> list[list[list[Candidate]]]:
        return [self._plausible(query) for query in queries]

    @torch.inference_mode()
    def _plausible(self, query: PositionQuery) -> list[list[Candidate]]:
        refuse_unknown_ids(query.ids, self.model, self.config.model)
        refuse_too_long(self.model.config, query.end, "a solution")
        ids = torch.tensor([query.ids[: query.end]], device=self.model.device)
        output = self.model(ids, use_cache=False, logits_to_keep=query.end - query.start + 1)
        logits = output.logits[0, :-1].float()  # (positions, V)
        candidates, valid = plausible(logits, self.config.alpha, self.config.top_k)  # (positions, K)
        probabilities = logits.softmax(-1).gather(-1, candidates).tolist()
        for position, row in enumerate(probabilities, start=query.start):
            if not math.isfinite(row[0]):
                raise UserError(
                    f"System 1's logits at position {position} of a solution are not finite; try dtype=float32"
                )
        return [
            [(token, p) for token, p, is_candidate in zip(*row, strict=True) if is_candidate]
            for row in zip(candidates.tolist(), probabilities, valid.tolist(), strict=True)
        ]

    def generate(
        self, requests: Sequence[Request], on_finished: OnFinished = ignore, on_token: OnToken = ignore
    ) -> list[Continuations]:
        # Requests with one prefix follow each other, the longest first: the decoder computes the shared tokens once.
        first = {id(request.prefix): i for i, request in reversed(list(enumerate(requests)))}
        order = sorted(range(len(requests)), key=lambda i: (first[id(requests[i].prefix)], -requests[i].prefix_len))
        results: list[Continuations] = [[] for _ in requests]
        for index, completions in self.decoder.stream(
            [requests[i].prompt for i in order],
            max_new_tokens=self.config.max_new_tokens,
            eos=self.eos,
            sampling=self.sampling,
            seeds=[requests[i].seeds for i in order],
            names=[requests[i].name for i in order],
            batch_size=self.config.batch_size,
            on_token=lambda prompt, sample, _: on_token(order[prompt], sample),
            stop=self._stop_fn([requests[i].token_ids for i in order]),
        ):
            results[order[index]] = [completion.token_ids for completion in completions]
            on_finished(order[index], results[order[index]])
        return results

    def _stop_fn(self, first_tokens: Sequence[Sequence[int]]) -> Callable[[int, int, Sequence[int]], bool] | None:
        """Ends a row once the text of its request's `token_ids` and its new tokens holds the stop pattern."""
        if self.config.stop_pattern is None:
            return None
        pattern = re.compile(self.config.stop_pattern)

        def stop(index: int, sample: int, new_tokens: Sequence[int]) -> bool:
            if len(new_tokens) % STOP_EVERY:
                return False
            return pattern.search(self.tokenizer.decode([*first_tokens[index], *new_tokens])) is not None

        return stop

    def close(self) -> None:
        del self.model, self.decoder
