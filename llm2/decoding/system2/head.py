"""A prefix head: scores from System 1's states at the prefixes. It reads no tokens and keeps nothing."""

from collections.abc import Callable, Sequence

import torch

from llm2.decoding.system2 import Candidates, Handle, System2


class Head(System2):
    """Args: `prefix_scores` maps states (n, D) and token ids (n, K) to scores (n, K), as ProcessVerifier's does."""

    needs_tokens = False
    needs_states = True

    def __init__(self, prefix_scores: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.prefix_scores = prefix_scores

    def score(self, handles: Sequence[Handle], candidates: Candidates) -> torch.Tensor:
        return self.prefix_scores(candidates.states, candidates.ids)
