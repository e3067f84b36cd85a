"""Rollouts by llm2's decoder, with continuous batching.

In float32 a continuation depends only on its prompt and seed, not on the rest of the batch.
"""

import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from llm2.common.architecture import refuse_too_long
from llm2.common.distributed import process_device
from llm2.common.loading import eos_ids, load_system1, refuse_unknown_ids, resolve_device
from llm2.config import RolloutConfig
from llm2.decoding.candidates import plausible
from llm2.decoding.decoder import Decoder
from llm2.decoding.processing import load_processor, logits_fn, process_each
from llm2.decoding.sampling import Guidance, SamplingParams
from llm2.errors import UserError
from llm2.exploration.engines import Candidate, Continuations, Engine, OnToken, PositionQuery, Request, ignore
from llm2.verifier.load import load_verifier, trained_beta

STOP_EVERY = 8  # tokens between searches for the stop pattern


class LocalEngine(Engine):
    """System 1 in this process, with `Decoder`."""

    window = 2

    def __init__(self, config: RolloutConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        device = process_device(resolve_device(config.device))
        self.config, self.tokenizer = config, tokenizer
        self.model = load_system1(config.model, device, config.dtype)
        self.decoder = Decoder(self.model, self._guidance(device), float16_weights=config.float16_weights)
        self.eos = eos_ids(self.model, tokenizer)
        self.processor = load_processor(config.logits_processor, tokenizer)
        greedy = config.temperature == 0
        self.sampling = None if greedy else SamplingParams(temperature=config.temperature, top_p=config.top_p)

    def _guidance(self, device: torch.device) -> Guidance | None:
        """Guidance of continuations by the verifier, if there is one; plausible tokens are always System 1's."""
        name, vocabulary = self.config.verifier, self.model.get_input_embeddings().num_embeddings
        if name is None:
            return None
        settings = self.config.guidance_kwargs()
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
        if self.processor is not None:
            rows = [query.ids[:position] for position in range(query.start, query.end)]
            logits = process_each(self.processor, rows, logits)
        candidates, valid = plausible(logits, self.config.alpha, self.config.top_k)  # (positions, K)
        probabilities = logits.softmax(-1).gather(-1, candidates).tolist()
        for position, row in enumerate(probabilities, start=query.start):
            if not math.isfinite(row[0]):
                raise UserError(f"System 1's logits at position {position} are not finite; try dtype=float32")
        return [
            [(token, p) for token, p, is_candidate in zip(*row, strict=True) if is_candidate and p]  # alpha=0 takes all
            for row in zip(candidates.tolist(), probabilities, valid.tolist(), strict=True)
        ]

    def stream(self, requests: deque[Request], on_token: OnToken = ignore) -> Iterator[tuple[int, Continuations]]:
        taken: list[tuple[int, Request] | None] = []  # by the decoder's index; None once finished

        def further() -> list[tuple[list[int], Sequence[int], str]]:
            """The next requests, grouped by prefix, longest first, so that shared tokens are computed once."""
            new = list(enumerate(requests, start=len(taken)))
            requests.clear()
            first = {id(request.prefix): index for index, request in reversed(new)}
            new.sort(key=lambda pair: (first[id(pair[1].prefix)], -pair[1].prefix_len))
            taken.extend(new)
            return [(request.prompt, request.seeds, request.name) for _, request in new]

        for index, completions in self.decoder.stream(
            [],
            max_new_tokens=self.config.max_new_tokens,
            eos=self.eos,
            sampling=self.sampling,
            seeds=[],
            batch_size=self.config.batch_size,
            on_token=lambda index, sample, _: on_token(taken[index][0], sample),
            stop=self._stop_fn(taken),
            process_logits=logits_fn(self.processor, lambda index: taken[index][1].prompt),
            further=further,
        ):
            number, taken[index] = taken[index][0], None
            yield number, [completion.token_ids for completion in completions]

    def _stop_fn(self, taken: Sequence[tuple[int, Request]]) -> Callable[[int, int, Sequence[int]], bool] | None:
        """Ends a row when the text of its request's `token_ids` and new tokens matches the stop pattern, and goes on
        behind the match: a number at the end of the text may not be whole. An own solution, all of which is new, is
        written to its end, since what is cut would be followed by an end of sequence as gold."""
        if self.config.stop_pattern is None:
            return None
        pattern = re.compile(self.config.stop_pattern)

        def stop(index: int, sample: int, new_tokens: Sequence[int]) -> bool:
            if len(new_tokens) % STOP_EVERY or not taken[index][1].token_ids:
                return False
            text = self.tokenizer.decode([*taken[index][1].token_ids, *new_tokens])
            return any(match.end() < len(text) for match in pattern.finditer(text))

        return stop

    def close(self) -> None:
        del self.model, self.decoder
