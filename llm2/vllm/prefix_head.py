"""A prefix head inside vLLM: a small product on System 1's states, without a second model or cache.

A logits processor does not see System 1's states. So Llama and Qwen get subclasses (`prefix_models`), out-of-tree
architectures `LLM2...`, whose `compute_logits` passes them to this module. With GuidedProcessor each request has its
own alpha and beta. Without it, if the engine has a default beta, `compute_logits` guides every row itself: then
log-probabilities are guided, and only the model differs from plain vLLM.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from transformers import AutoConfig

from llm2.common.loading import is_local, model_path
from llm2.decoding.system2.head import Head
from llm2.errors import UserError
from llm2.verifier.heads import PrefixHead, stored_fingerprint
from llm2.verifier.model import ProcessVerifierConfig
from llm2.vllm.core import GuidedBatch
from llm2.vllm.plugin import ARCHITECTURES, PLUGIN, register


class HeadBatch(GuidedBatch):
    """Scores from the states of the last `compute_logits`, one row for each row of logits."""

    head: PrefixHead
    embed: Callable[[torch.Tensor], torch.Tensor]  # System 1's input embedding, (n,) -> (n, D)
    shown: torch.Tensor  # (R, D)

    def __init__(self) -> None:
        super().__init__(Head(self._prefix_scores))

    def states(self, rows: torch.Tensor) -> torch.Tensor:
        return self.shown[rows]

    def _prefix_scores(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        embeddings = self.embed(tokens.flatten()).unflatten(0, tokens.shape)  # (n, K, D)
        return self.head(states[:, None], embeddings)


@cache
def head_batch() -> HeadBatch:
    """The batch of this process, shared by processor and model: vLLM creates the processor first."""
    return HeadBatch()


def load_head(name: str, config: ProcessVerifierConfig) -> PrefixHead:
    """Load the head without System 1."""
    width = config.backbone_config.get_text_config().hidden_size
    head = PrefixHead(config.prefix_head, nn.Embedding.from_pretrained(torch.ones(1, width, device="cpu")))
    head.load_weights(model_path(name), local_files_only=is_local(name))
    return head.float().eval().requires_grad_(False)


def check_fingerprint(model: str, name: str, config: ProcessVerifierConfig) -> None:
    """Raise UserError if a head was trained on the states of another System 1 than the checkpoint `model`."""
    if stored_fingerprint(model) != config.system1_fingerprint:
        raise UserError(
            f"verifier {name!r}: it was trained on the states of {config.base_model}, found another System 1, {model}; "
            "a prefix head does not work with any other model"
        )


def plugin_overrides(model: str) -> dict[str, list[str]]:
    """vLLM's `hf_overrides` for a prefix head on this model. Raises UserError for families without a subclass."""
    (architecture,) = AutoConfig.from_pretrained(model, local_files_only=is_local(model)).architectures
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"model {model!r}: found {architecture} with a prefix head, which in vLLM needs one of "
            f"{', '.join(ARCHITECTURES)}; expected engine: llm2 or a verifier of its own weights"
        )
    register()
    return {"architectures": [PLUGIN + architecture]}
