"""A second language model in the verifier's place, such as System 1 fine-tuned: z + beta * (z2 - z).

Contrastive guidance (Liu et al., arXiv 2105.03023 and 2401.08565) on System 1's plausible set, as the rival of a
verifier. Logits processors act on z alone, before: at beta = 1 the second model chooses, whatever they reweighted.
"""

import torch

from llm2.decoding.model_runner import LMRunner


class ContrastRunner(LMRunner):
    """Scores candidates by the second model's logits less System 1's."""

    reads_candidates = False

    def prefix_scores(self, states: torch.Tensor, tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """States (n, D), token ids and System 1's logits (n, K) -> (n, K) float32."""
        return self.logits(states).gather(-1, tokens) - logits
