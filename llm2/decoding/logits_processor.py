"""The verifier as a transformers LogitsProcessor, for other decoding loops."""

import warnings
from collections import Counter

import torch
from transformers import LogitsProcessor

from llm2.common.prefix import common_prefix
from llm2.decoding.candidates import check_scores, guided_logits, over_vocabulary, plausible
from llm2.decoding.kv_cache import SlotCache
from llm2.decoding.sampling import Guidance
from llm2.decoding.system2 import Candidates
from llm2.decoding.system2.kinds import open_system2, runner_of


class GuidedLogitsProcessor(LogitsProcessor):
    """Adds beta times the verifier's scores to the plausible tokens' logits and sets all others to -inf.

    For one call of `model.generate(..., logits_processor=[...])`, beam search included, or any loop that applies
    transformers' processors. The verifier's cache is kept per row and recomputed from where a row's tokens changed, as
    under beam search. Limits, none of which `LLM2.generate` has: the verifier always runs in a forward of its own, rows
    do not join or leave, and a processor is not told the attention mask. It must come before temperature and the other
    warpers, as `generate` orders them.

    transformers' continuous batching (`generate_batch`, `cache_implementation="paged"`) never calls a processor, and
    says nothing. So one that is thrown away without having been called warns that nothing was guided.

    Args:
        attention_mask: (B, T) of the prompts, left-padded; None for one prompt, whose beams and samples may be many
            rows. A pad token cannot be told from text: it may be the end-of-sequence token.

    Raises ValueError for a mask that is not left-padded.
    """

    supports_continuous_batching = False
    unused = False

    def __init__(self, guidance: Guidance, *, attention_mask: torch.Tensor | None = None) -> None:
        self.runner = runner_of(guidance.verifier)
        self.guidance, self.attention_mask, self.prompt = guidance, attention_mask, None
        self._open(0)
        if self.system2.needs_states:
            raise ValueError("a prefix head needs System 1's states, which a logits processor does not see")
        if attention_mask is not None:
            padded = ~attention_mask.bool()
            if padded[:, -1].any() or (padded[:, 1:] & ~padded[:, :-1]).any():
                raise ValueError("attention_mask: expected padding on the left alone")
            self.padding = padded.sum(dim=-1).tolist()  # of each prompt
        self.unused = True

    def __del__(self) -> None:
        if self.unused:
            text = "GuidedLogitsProcessor was never called: nothing was guided (generate_batch ignores processors)"
            warnings.warn(text, RuntimeWarning, stacklevel=1)

    @torch.no_grad()  # not inference_mode: processors behind it may write in place
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """input_ids (B, T), System 1's logits (B, V) -> guided logits (B, V), -inf where not plausible.

        Raises UserError for a score that is not finite, with its row, and ValueError for logits of another shape, as
        of a paged cache, and for rows that the attention mask is not of.
        """
        if scores.dim() != 2:
            raise ValueError(f"scores: found the shape {tuple(scores.shape)}, expected (batch, vocabulary)")
        self.unused = False
        padding = self._padding(input_ids)
        if len(input_ids) > len(self.handles):
            self._open(len(input_ids))
        logits = scores.float()
        candidates, valid = plausible(logits, self.guidance.alpha, self.guidance.top_k)  # (B, K)
        found = Candidates(candidates, valid, logits.gather(-1, candidates))
        rows = [row for row, size in enumerate(valid.sum(dim=-1).tolist()) if size > 1]
        for row in rows:
            ids, handle = input_ids[row, padding[row] :].tolist(), self.handles[row]
            self.system2.rewind(handle, shared := common_prefix(handle.token_ids, ids))
            self.system2.commit(handle, ids[shared:])
        system2_scores = self.system2.score_rows(rows, self.handles, found)
        check_scores(system2_scores, candidates, valid)
        guided = guided_logits(found.logits, valid, system2_scores, self.guidance.beta)
        return over_vocabulary(scores, candidates, guided)

    def _open(self, rows: int) -> None:
        self.system2 = open_system2(self.guidance.verifier, self.runner, SlotCache(rows), range(rows), Counter())
        self.handles = [self.system2.join([]) for _ in range(rows)]

    def _padding(self, input_ids: torch.LongTensor) -> list[int]:
        """Of each row; beams and samples of a prompt follow one another."""
        rows, length = input_ids.shape
        if self.attention_mask is not None:
            prompts, width = self.attention_mask.shape
            if rows % prompts or length < width:
                raise ValueError(f"attention_mask: found {prompts} rows of {width} tokens for {rows} of {length}")
            return [count for count in self.padding for _ in range(rows // prompts)]
        if self.prompt is None:
            self.prompt = input_ids[0]
        if length < len(self.prompt) or (input_ids[:, : len(self.prompt)] != self.prompt).any():
            raise ValueError("attention_mask: expected the one of these prompts, found none; they may be padded")
        return [0] * rows
