"""Guidance by a second language model in the verifier's place, such as System 1 fine-tuned: z + beta * (z2 - z).

Contrastive guidance (Liu et al., arXiv 2105.03023 and 2401.08565) on System 1's plausible set, as the rival of a
verifier. It goes through `DecodeRequest.process_logits`; the second model runs at every token.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from llm2.common.prefix import common_prefix
from llm2.config import GuidanceConfig
from llm2.decoding.candidates import guided_logits, over_vocabulary, plausible
from llm2.decoding.forward_batch import Chunk
from llm2.decoding.kv_cache import SlotCache
from llm2.decoding.model_runner import LMRunner


class ContrastLogits:
    """The guided logits of one call of the decoder, as its `process_logits`.

    Rows of a step have a slot of the second model's cache each; what of a row's tokens is not cached there, as after
    another row has left, is computed anew.

    Args:
        model: the second model, with System 1's tokenizer.
        prompts: of the call, token ids.
        guidance: alpha and top_k of the plausible set, and beta.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], guidance: GuidanceConfig) -> None:
        self.runner, self.prompts, self.guidance = LMRunner(model), prompts, guidance
        self.cache = SlotCache(0)
        self.cached_ids: list[list[int]] = []

    def __call__(self, prompt_indices: list[int], completions: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
        """Prompts and new tokens of n rows, System 1's logits (n, V) -> (n, V), -inf where not plausible."""
        if len(prompt_indices) > self.cache.num_slots:
            self.cache, self.cached_ids = SlotCache(len(prompt_indices)), [[] for _ in prompt_indices]
        chunks = []
        for slot, (prompt, completion) in enumerate(zip(prompt_indices, completions, strict=True)):
            ids = [*self.prompts[prompt], *completion]
            start = min(common_prefix(self.cached_ids[slot], ids), len(ids) - 1)
            self.cached_ids[slot] = ids
            chunks.append(Chunk(slot, start, ids[start:]))
        hidden = self.runner.forward(self.cache, chunks)
        scores = self.runner.logits(hidden[[chunk.last for chunk in chunks]]) - logits  # (n, V)
        candidates, valid = plausible(logits, self.guidance.alpha, self.guidance.top_k)  # (n, K)
        values, scores = logits.gather(-1, candidates), scores.gather(-1, candidates)
        guided = guided_logits(values, valid, scores, self.guidance.beta)
        return over_vocabulary(logits, candidates, guided)
