"""System 2 as a transformers LogitsProcessor, for loops that are not ours."""

import torch
from transformers import LogitsProcessor

from llm2.decoding.candidates import guided_logits, plausible
from llm2.decoding.decoder import Guidance
from llm2.decoding.forward_batch import Piece
from llm2.decoding.kv_cache import SlotCache
from llm2.decoding.model_runner import System2Reader
from llm2.decoding.prefix_cache import common_prefix


class GuidedLogitsProcessor(LogitsProcessor):
    """Adds beta times the verifier's scores to the plausible tokens' logits and rules out the others.

    For one call of `model.generate(..., logits_processor=[...])`, beam search included, or any loop that keeps
    to transformers' processors. What it has read of a row it keeps, and reads anew from where the row became another
    one (beams). Its limits: a forward of its own for System 2 always, no rows that come and go, no lazy catching up in
    full batches; a processor sees no attention mask, so leading pad tokens are taken to be padding; and since it rules
    tokens out, it must stand before temperature and the other warpers, which `generate` sees to. `LLM2.generate` has
    none of these limits.
    """

    def __init__(self, guidance: Guidance, pad_token_id: int | None = None) -> None:
        self.guidance, self.pad = guidance, pad_token_id
        self.reader = System2Reader(guidance.verifier)
        self.cache = SlotCache(0)
        self.known: list[list[int]] = []

    @torch.inference_mode()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """input_ids (B, T), System 1's logits (B, V) -> guided logits (B, V), -inf where not plausible."""
        if len(input_ids) > self.cache.slots:
            self.cache, self.known = SlotCache(len(input_ids)), [[] for _ in input_ids]
        candidates, valid = plausible(scores.float(), self.guidance.alpha, self.guidance.top_k)  # (B, K)
        sizes = valid.sum(dim=-1).tolist()
        pieces = []
        for slot, size in enumerate(sizes):
            if size > 1:
                ids = self._unpadded(input_ids[slot].tolist())
                start = min(common_prefix(self.known[slot], ids), len(ids))
                self.known[slot] = ids
                pieces.append(Piece(slot, start, [*ids[start:], *candidates[slot, :size].tolist()], size))
        found = torch.zeros_like(candidates, dtype=torch.float32)
        if pieces:
            hidden = self.reader.read(self.cache, pieces)
            for piece in pieces:
                found[piece.slot, : piece.branches] = self.reader.scores(hidden[piece.heads.start : piece.heads.stop])
        guided = guided_logits(scores.float().gather(-1, candidates), valid, found, self.guidance.beta)
        whole = torch.full_like(scores, -torch.inf)
        # What only fills the rectangle repeats a token id: it must not write over a candidate.
        rows, columns = valid.nonzero(as_tuple=True)
        whole[rows, candidates[rows, columns]] = guided[rows, columns].to(scores.dtype)
        return whole

    def _unpadded(self, ids: list[int]) -> list[int]:
        first = next((place for place, token in enumerate(ids) if token != self.pad), len(ids))
        return ids[first:]
