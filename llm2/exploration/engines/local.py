"""Rollouts by the project's own decode ladder: rows leave and join a batch that stays full.

A continuation depends on its prefix and its seed alone, never on what else is in the batch.
"""

import re
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from llm2.common.distributed import dist_info, pin_to_cores
from llm2.common.loading import eos_ids, load_system1, resolve_device
from llm2.config import ExploreConfig
from llm2.decoding.candidates import plausible
from llm2.decoding.decoder import Decoder
from llm2.decoding.sampling import SamplingParams
from llm2.errors import UserError
from llm2.exploration.engines import Candidate, PositionQuery, Request

STOP_EVERY = 8  # tokens after which a row is looked at again for the stop pattern


class LocalEngine:
    def __init__(self, config: ExploreConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        device = resolve_device(config.device)
        if device.type == "cuda":
            device = torch.device("cuda", dist_info().local_rank)
        else:
            pin_to_cores()
        self.config, self.tokenizer = config, tokenizer
        self.model = load_system1(config.model, device, config.dtype)
        self.decoder = Decoder(self.model)
        self.eos = eos_ids(self.model, tokenizer)
        self.sampling = (
            SamplingParams(temperature=config.temperature, top_p=config.top_p) if config.temperature else None
        )

    @torch.inference_mode()
    def plausible(self, spans: Sequence[PositionQuery]) -> list[list[list[Candidate]]]:
        return [self._plausible(span) for span in spans]

    def _plausible(self, span: PositionQuery) -> list[list[Candidate]]:
        self._refuse_strangers(span.ids)
        ids = torch.tensor([span.ids[: span.end]], device=self.model.device)
        output = self.model(ids, use_cache=False, logits_to_keep=span.end - span.start + 1)
        logits = output.logits[0, :-1].float()  # (positions, V)
        candidates, valid = plausible(logits, self.config.alpha, self.config.top_k)
        probabilities = logits.softmax(-1).gather(-1, candidates)
        return [
            [(token, p) for token, p, real in zip(*row, strict=True) if real]
            for row in zip(candidates.tolist(), probabilities.tolist(), valid.tolist(), strict=True)
        ]

    def generate(
        self, requests: Sequence[Request], on_tokens: Callable[[int], None] = lambda count: None
    ) -> list[list[list[int]]]:
        # Requests of one trunk stand together, its longest prefix first: what they share is then read once.
        place_of: dict[int, int] = {}
        for request in requests:
            place_of.setdefault(id(request.trunk), len(place_of))
        order = sorted(range(len(requests)), key=lambda i: (place_of[id(requests[i].trunk)], -requests[i].bound))
        continuations: list[list[list[int]]] = [[] for _ in requests]
        for index, rows in self.decoder.stream(
            [requests[i].prefix for i in order],
            max_new_tokens=self.config.max_new_tokens,
            eos=self.eos,
            sampling=self.sampling,
            seeds=[requests[i].seeds for i in order],
            batch_size=self.config.batch_size,
            stop=self._stop_for([requests[i] for i in order]),
        ):
            continuations[order[index]] = [row.token_ids for row in rows]
            on_tokens(sum(len(row.token_ids) for row in rows))
        return continuations

    def _stop_for(self, requests: Sequence[Request]) -> Callable[[int, int, Sequence[int]], bool] | None:
        """Whether a row's answer is decided: what it has written, its own first tokens included, holds the pattern."""
        if self.config.stop_pattern is None:
            return None
        pattern = re.compile(self.config.stop_pattern)

        def stop(index: int, sample: int, tokens: Sequence[int]) -> bool:
            if len(tokens) % STOP_EVERY:
                return False
            return pattern.search(self.tokenizer.decode([*requests[index].own, *tokens])) is not None

        return stop

    def close(self) -> None:
        del self.model, self.decoder

    def _refuse_strangers(self, ids: Sequence[int]) -> None:
        vocabulary = self.model.get_input_embeddings().num_embeddings
        if max(ids) >= vocabulary:
            raise UserError(
                f"the tokenizer of {self.config.model} writes the token {max(ids)}, and its model has a vocabulary of "
                f"{vocabulary}; expected a tokenizer and a model that belong together"
            )
