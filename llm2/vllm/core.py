"""System 2 for an engine that runs System 1: guided logits for the rows of a batch. Does not import vllm.

The engine owns the batch. Its rows come in any order; sequences join, leave, come back after a preemption, or are still
within their prompt.

Letters: R rows of a step, n of them guided, K candidates, V vocabulary.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llm2.config import GuidanceConfig
from llm2.decoding.candidates import guided_logits, plausible
from llm2.decoding.forward_batch import Chunk
from llm2.decoding.kv_cache import SlotCache
from llm2.decoding.linear import use_onednn
from llm2.decoding.model_runner import VerifierRunner
from llm2.decoding.system2 import Candidates, Handle, System2
from llm2.decoding.system2.reader import Reader
from llm2.verifier.model import ProcessVerifier

MAX_BRANCHES = 64  # candidates of a sequence in one forward; more take several

logger = logging.getLogger(__name__)
started = time.time()
total: Counter[str | float] = Counter()  # of all batches of this process: see `counts`


def counts() -> dict[str, Any]:
    """What guidance has done in this process: rows of logits guided with each beta, at least one a token written;
    System 2's forwards and the tokens read in them, none for a kind that runs no model."""
    betas = {f"{beta:g}": rows for beta, rows in total.items() if not isinstance(beta, str)}
    forwards = {f"verifier_{key}": total[f"system2_{key}"] for key in ("forwards", "tokens")}
    return {"started": started, "guided_tokens": betas, **forwards}


@dataclass(eq=False)
class GuidedSequence:
    """A sequence in flight."""

    guidance: GuidanceConfig
    handle: Handle
    has_nonfinite_score: bool = False  # an error was logged for it


class GuidedBatch:
    """Guides rows of logits by any kind of System 2."""

    def __init__(self, system2: System2) -> None:
        self.system2 = system2

    def join(self, guidance: GuidanceConfig, token_ids: Sequence[int]) -> GuidedSequence:
        """A new sequence, or one that comes back."""
        return GuidedSequence(guidance, self.system2.join(token_ids))

    def leave(self, sequence: GuidedSequence) -> None:
        """The sequence is finished, aborted or preempted."""
        self.system2.leave(sequence.handle)

    def states(self, rows: torch.Tensor) -> torch.Tensor | None:
        """System 1's last hidden states (n, D) of these rows, where the engine shows them."""
        return None

    @torch.inference_mode()
    def guide(self, logits: torch.Tensor, rows: Sequence[tuple[int, GuidedSequence]]) -> None:
        """Replace System 1's logits (R, V) float32, in the given rows, by guided ones, -inf where not plausible.

        A row with a score that is not finite gets System 1's on its candidates, and an error is logged once for each
        sequence: an exception here would end all requests of a server.
        """
        if not rows:
            return
        total.update(sequence.guidance.beta for _, sequence in rows)
        sequences = [sequence for _, sequence in rows]
        index = torch.tensor([row for row, _ in rows], device=logits.device)  # (n,)
        ids, valid = _plausible(logits[index], [sequence.guidance for sequence in sequences])
        candidates = Candidates(ids, valid, logits[index[:, None], ids], self.states(index))
        scores = self._scores(sequences, candidates)
        finite = scores.isfinite().all(dim=-1)  # (n,)
        for sequence, fine in zip(sequences, finite.tolist(), strict=True):
            if not (fine or sequence.has_nonfinite_score):
                sequence.has_nonfinite_score = True
                logger.error(
                    "a score of System 2 is not finite at token %d of a request: such tokens are chosen by System 1 "
                    "alone; try dtype=float32",
                    len(sequence.handle.token_ids),
                )
        beta = torch.tensor([[sequence.guidance.beta] for sequence in sequences], device=logits.device)
        guided = guided_logits(candidates.logits, valid, scores.masked_fill(~finite[:, None], 0.0), beta)  # (n, K)
        logits.index_fill_(0, index, -torch.inf)
        row, column = valid.nonzero(as_tuple=True)
        logits[index[row], ids[row, column]] = guided[row, column]

    def _scores(self, sequences: Sequence[GuidedSequence], candidates: Candidates) -> torch.Tensor:
        """(n, K); zeros for padding, and for rows that a model need not be run for."""
        handles = [sequence.handle for sequence in sequences]
        if not self.system2.runs_model:
            return self.system2.score(handles, candidates).masked_fill(~candidates.valid, 0.0)
        sizes = enumerate(candidates.valid.sum(dim=-1).tolist())
        rows = [row for row, size in sizes if size > 1 and sequences[row].guidance.beta]
        return self.system2.score_rows(rows, handles, candidates)


def open_verifier(verifier: ProcessVerifier, num_slots: int, max_len: int, max_tokens: int = 8_192) -> Reader:
    """System 2 with all its memory: `num_slots` sequences in flight of `max_len` tokens, `max_tokens` in a forward."""
    runner = VerifierRunner(verifier)
    use_onednn(runner.body)
    cache = SlotCache(num_slots, max_len + MAX_BRANCHES + 1)  # the last position is for padding
    with torch.inference_mode():
        runner.forward(cache, [Chunk(0, 0, [0])])  # allocates the layers of the cache
    return Reader(runner, cache, range(num_slots), total, max_tokens, MAX_BRANCHES, keep_longest=True)


def _plausible(logits: torch.Tensor, guidance: Sequence[GuidanceConfig]) -> tuple[torch.Tensor, torch.Tensor]:
    """`plausible` with each row's own alpha and top_k, (n, K) and (n, K)."""
    groups: dict[tuple[float, int | None], list[int]] = {}
    for row, settings in enumerate(guidance):
        groups.setdefault((settings.alpha, settings.top_k), []).append(row)
    found = {tuple(rows): plausible(logits[rows], *settings) for settings, rows in groups.items()}
    width = max(ids.shape[1] for ids, _ in found.values())
    ids = torch.zeros(len(logits), width, dtype=torch.long, device=logits.device)
    valid = torch.zeros(len(logits), width, dtype=torch.bool, device=logits.device)
    for rows, parts in found.items():
        for whole, part in zip((ids, valid), parts, strict=True):
            whole[list(rows), : part.shape[1]] = part
    return ids, valid
