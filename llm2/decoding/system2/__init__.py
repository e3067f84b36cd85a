"""System 2 as decoding sees it: sequences join, their candidates are scored, chosen tokens are committed, they leave.

The scheduler, `GuidedLogitsProcessor`, vLLM and recomputed traces all guide through this interface. A kind of System 2
is a file: `reader` for verifiers that read tokens, `contrast` for a language model in a verifier's place, `head` for
heads on System 1's states. Any other is a subclass of System2, given to `Guidance` as its verifier.

Letters: n sequences, K candidates, V vocabulary, D width of System 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch


@dataclass(eq=False)
class Handle:
    """A sequence as System 2 knows it.

    Attributes:
        slot: of the cache, where there is one.
        prefix: a sequence in whose slot the first `prefix_len` tokens are read in place; its own slot holds the rest.
        num_read: how many of the tokens have been read.
        branches: the candidates that were read last, whose keys and values stand behind what was read.
        kept: index of the branch that was chosen and has not been moved to its place yet.
        num_tokens: read so far for this sequence alone, candidates included.
    """

    token_ids: list[int]
    slot: int = -1
    prefix: Self | None = None
    prefix_len: int = 0
    num_read: int = 0
    branches: Sequence[int] = ()
    kept: int | None = None
    num_tokens: int = 0


@dataclass(eq=False)
class Candidates:
    """System 1's plausible next tokens of n sequences.

    Attributes:
        ids: (n, K) token ids, best first, then padding.
        valid: (n, K), False for padding.
        logits: (n, K) float32, System 1's.
        states: (n, D) System 1's last hidden states at the sequences' last tokens, for kinds that need them.
    """

    ids: torch.Tensor
    valid: torch.Tensor
    logits: torch.Tensor
    states: torch.Tensor | None = None

    @cached_property
    def lists(self) -> list[list[int]]:
        """The ids of each sequence, without padding."""
        return [row[:size] for row, size in zip(self.ids.tolist(), self.valid.sum(dim=-1).tolist(), strict=True)]

    def __getitem__(self, rows: torch.Tensor | list[int]) -> "Candidates":
        states = None if self.states is None else self.states[rows]
        return Candidates(self.ids[rows], self.valid[rows], self.logits[rows], states)


class System2(ABC):
    """Scores candidates. A subclass has to write `score` alone; the tokens of a sequence are in its handle.

    Attributes:
        runs_model: scoring runs a model, so sequences wait for one another and the runs are counted.
        needs_tokens: handles must hold the sequences' tokens.
        needs_states: `Candidates.states` must be given, which a logits processor cannot do.
    """

    runs_model = False
    needs_tokens = True
    needs_states = False

    def join(self, token_ids: Sequence[int], prefix: Handle | None = None, prefix_len: int = 0) -> Handle:
        """A sequence with these tokens. A kind may use that its first `prefix_len` tokens are those of `prefix`."""
        return Handle(list(token_ids))

    @abstractmethod
    def score(self, handles: Sequence[Handle], candidates: Candidates) -> torch.Tensor:
        """Scores of the candidates behind the tokens of each sequence, (n, K) float32; any numbers for padding."""

    def score_rows(self, rows: Sequence[int], handles: Sequence[Handle], candidates: Candidates) -> torch.Tensor:
        """`score` of some of the sequences, (n, K); zeros for the others, and for padding."""
        scores = torch.zeros(candidates.ids.shape, device=candidates.ids.device)
        if rows:
            found = candidates[rows]
            scores[rows] = self.score([handles[row] for row in rows], found).masked_fill(~found.valid, 0.0)
        return scores

    def commit(self, handle: Handle, tokens: Sequence[int]) -> None:
        """The sequence goes on with these tokens."""
        handle.token_ids += tokens

    def rewind(self, handle: Handle, length: int) -> None:
        """The sequence is back at its first `length` tokens."""
        del handle.token_ids[length:]

    def leave(self, handle: Handle) -> None:  # noqa: B027, most kinds have nothing to free
        """The sequence is finished, or interrupted: it may join again."""
