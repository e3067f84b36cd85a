"""Prefix heads: a System 2 that is only a head on System 1's states, without tokens of its own to read.

The score of token v after the prefix x_<t is a function of two vectors that System 1 has anyway: its last hidden state
h at the prefix's last token, and v's input embedding e. So no candidate is read, and there is no second cache.

Letters: D width, K candidates.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from llm2.errors import UserError

SAMPLED = 16  # values per weight that a fingerprint is made of


class TokenWeight(nn.Linear):
    """w(h) = softplus(u . h + b), the factor of all scores after a prefix with the state h; 1 before training."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1)
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, math.log(math.e - 1))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """h (..., D) -> (...) float32, not negative."""
        logits = nn.functional.linear(states.float(), self.weight.float(), self.bias.float())
        return nn.functional.softplus(logits).squeeze(-1)


class PrefixHead(nn.Module):
    """s = (A h) . (B e) + w . e, or a two-layer MLP of h and e; with a token weight w(h) times that.

    Args:
        settings: `kind`, bilinear or mlp, and `size`: the rank of A and B, or the width of the MLP; `token_weight`,
            whether there is one, no if absent.
        embedding: (V, D) System 1's input embedding; e is scaled by its root mean square, so that a learning rate
            suits models of any scale.
    """

    def __init__(self, settings: Mapping[str, Any], embedding: torch.Tensor) -> None:
        super().__init__()
        width, size = embedding.shape[1], settings["size"]
        self.kind = settings["kind"]
        if self.kind == "bilinear":
            self.state = nn.Linear(width, size, bias=False)
            self.token = nn.Linear(width, size, bias=False)
            self.bias = nn.Linear(width, 1, bias=False)
        else:
            self.layers = nn.Sequential(
                nn.Linear(2 * width, size), nn.GELU(), nn.Linear(size, size), nn.GELU(), nn.Linear(size, 1, bias=False)
            )
        self.token_weight = TokenWeight(width) if settings.get("token_weight") else None
        self.register_buffer("scale", embedding.detach().float().square().mean().rsqrt())

    def forward(self, states: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """h (..., D), e (..., D), which broadcast -> (...) float32."""
        states, embeddings = states.float(), embeddings.float() * self.scale
        if self.kind == "bilinear":
            scores = (self.state(states) * self.token(embeddings)).sum(-1) + self.bias(embeddings).squeeze(-1)
        else:
            scores = self.layers(torch.cat([states.expand_as(embeddings), embeddings], dim=-1)).squeeze(-1)
        return scores if self.token_weight is None else scores * self.token_weight(states)

    def load_weights(self, name: str, **options) -> None:
        """Read a verifier's folder or hub id. Raises UserError where its weights are not those of this head."""
        state = load_file(cached_file(name, SAFE_WEIGHTS_NAME, **options))
        try:
            self.load_state_dict({key.removeprefix("score."): tensor for key, tensor in state.items()})
        except RuntimeError as error:  # missing or unknown keys, other shapes
            raise UserError(f"its weights are not those of its head: {str(error).splitlines()[1].strip()}") from None


def fingerprint(backbone: PreTrainedModel) -> str:
    """Fingerprint of System 1's weights, independent of the dtype they are loaded in.

    A hash of a few values of every weight, in bfloat16: a head is worth nothing on states of another model.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(backbone.named_parameters()):
        flat = weight.detach().flatten()
        values = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].to(torch.bfloat16)
        digest.update(
            name.encode() + str(tuple(weight.shape)).encode() + values.view(torch.int16).cpu().numpy().tobytes()
        )
    return digest.hexdigest()
