"""Negatives without rollouts, for comparison: they may be as good as gold.

plausible  every plausible token but gold
sampled    draws from the plausible tokens but gold, by System 1's probabilities
contrast   the same with the logits z1 + w * (z1 - z2), favouring tokens that System 1 rates above a better model
random     draws from the vocabulary but gold, uniformly
"""

import math
import random
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm2.common.distributed import process_device
from llm2.common.loading import load_system1, resolve_device
from llm2.common.same_tokenizer import require_same_tokenizer
from llm2.common.seeds import row_seed
from llm2.config import ExploreConfig
from llm2.errors import UserError
from llm2.exploration.quality import Fork
from llm2.exploration.solutions import TokenizedSolution


class NegativeSampler:
    """Chooses the negatives of a solution's forks by `config.negatives`, one of the kinds above."""

    def __init__(self, config: ExploreConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.vocabulary = config, len(tokenizer)
        self.contrast_model: PreTrainedModel | None = None
        if config.negatives == "contrast":
            device = process_device(resolve_device(config.device))
            require_same_tokenizer(f"contrast_model {config.contrast_model!r}", config.contrast_model, tokenizer)
            self.contrast_model = load_system1(config.contrast_model, device, config.dtype)

    def __call__(self, solution: TokenizedSolution, forks: Sequence[Fork]) -> list[Fork]:
        """The forks with their distinct negatives in place of the plausible tokens."""
        rng = random.Random(row_seed(self.config.seed, solution.problem.id, "negatives"))
        if self.config.negatives == "contrast":
            weights = self._contrast_weights(solution, forks)
        else:
            weights = [fork.probabilities[1:] for fork in forks]
        return [self._draw(fork, fork_weights, rng) for fork, fork_weights in zip(forks, weights, strict=True)]

    def _draw(self, fork: Fork, weights: Sequence[float], rng: random.Random) -> Fork:
        gold, draws = fork.tokens[0], range(self.config.negatives_per_fork)
        probabilities = dict(zip(fork.tokens, fork.probabilities, strict=True))
        if self.config.negatives == "plausible":
            drawn = fork.tokens[1:]
        elif self.config.negatives == "random":
            others = (rng.randrange(self.vocabulary - 1) for _ in draws)
            drawn = [token + (token >= gold) for token in others]
        else:
            drawn = rng.choices(fork.tokens[1:], weights, k=len(draws))
        tokens = (gold, *dict.fromkeys(drawn))
        return Fork(fork.position, tokens, tuple(probabilities.get(token, 0.0) for token in tokens))

    @torch.inference_mode()
    def _contrast_weights(self, solution: TokenizedSolution, forks: Sequence[Fork]) -> list[list[float]]:
        ids = torch.tensor([solution.ids[: solution.end]], device=self.contrast_model.device)
        logprobs = self.contrast_model(ids, use_cache=False).logits[0].float().log_softmax(-1).cpu()  # (T, V)
        weights, w = [], self.config.contrast_weight
        for fork in forks:
            others = logprobs[fork.position - 1, list(fork.tokens[1:])].tolist()
            pairs = zip(fork.probabilities[1:], others, strict=True)
            contrast = [(1 + w) * math.log(p) - w * other for p, other in pairs]
            largest = max(contrast)
            weights.append([math.exp(value - largest) for value in contrast])
        return weights


def check_negatives(config: ExploreConfig) -> None:
    """Raise UserError if contrast_model is missing, or set but unused."""
    if (config.contrast_model is not None) != (config.negatives == "contrast"):
        raise UserError(
            f"contrast_model: found {config.contrast_model!r} with negatives={config.negatives}, expected a model with "
            "negatives=contrast and none without"
        )
