"""Prefix heads: a System 2 that is only a head on System 1's states, without tokens of its own to read.

The score of token v after the prefix x_<t is a function of two vectors that System 1 has anyway: its last hidden state
h at the prefix's last token, and v's input embedding e. So no candidate is read, and there is no second cache.

Letters: D width, K candidates.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from llm2.common.loading import is_local
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
        embedding: System 1's input embedding, of weight (V, D); e is divided by the root mean square of what it
            returns, so that a learning rate suits models of any scale.
    """

    def __init__(self, settings: Mapping[str, Any], embedding: nn.Embedding) -> None:
        super().__init__()
        weight, size = embedding.weight.detach(), settings["size"]
        width = weight.shape[1]
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
        some = torch.arange(min(len(weight), 64), device=weight.device)
        factor = (embedding(some).detach().float().norm() / weight[some].float().norm()).nan_to_num(1.0)  # Gemma's
        self.register_buffer("scale", weight.float().square().mean().rsqrt() / factor)

    def forward(self, states: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """h (..., D), e (..., D), which broadcast -> (...) float32."""
        dtype = next(self.parameters()).dtype  # float32, but where DeepSpeed trains in bfloat16
        states, embeddings = states.to(dtype), (embeddings.float() * self.scale).to(dtype)
        if self.kind == "bilinear":
            scores = (self.state(states) * self.token(embeddings)).sum(-1) + self.bias(embeddings).squeeze(-1)
        else:
            scores = self.layers(torch.cat([states.expand_as(embeddings), embeddings], dim=-1)).squeeze(-1)
        scores = scores.float()
        return scores if self.token_weight is None else scores * self.token_weight(states)

    def load_weights(self, name: str, **options) -> None:
        """Read a verifier's folder or hub id. Raises UserError where its weights are not those of this head."""
        state = load_file(cached_file(name, SAFE_WEIGHTS_NAME, **options))
        try:
            self.load_state_dict({key.removeprefix("score."): tensor for key, tensor in state.items()})
        except RuntimeError as error:  # missing or unknown keys, other shapes
            raise UserError(f"its weights are not those of its head: {str(error).splitlines()[1].strip()}") from None


def fingerprint(backbone: PreTrainedModel) -> str:
    """Fingerprint of System 1's weights, the same in every dtype with float32's range.

    A hash of a few values of every weight, in bfloat16: a head is worth nothing on states of another model.
    """
    return _fingerprint(sorted(backbone.named_parameters(), key=itemgetter(0)))


def output_fingerprint(system1: PreTrainedModel) -> str:
    """Fingerprint of System 1's output embedding, which need not be its body's."""
    return _fingerprint([("weight", system1.get_output_embeddings().weight)])


@cache
def stored_fingerprint(model: str, prefix: str = "model.") -> str:
    """The fingerprint of a folder's or hub id's files, whose keys begin with `prefix`.

    For weights that vLLM has loaded, and for float16, which has rounded them otherwise. Once a process: it reads the
    whole checkpoint.
    """
    folder = Path(model if is_local(model) else snapshot_download(model, allow_patterns=["*.safetensors"]))
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in sorted(folder.glob("*.safetensors"))]
        keys = [(key, file) for file in files for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
        return _fingerprint(
            (key.removeprefix(prefix), file.get_tensor(key)) for key, file in sorted(keys, key=itemgetter(0))
        )


def _fingerprint(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in weights:
        flat = weight.detach().flatten()
        values = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].to(torch.bfloat16)
        digest.update(
            name.encode() + str(tuple(weight.shape)).encode() + values.view(torch.int16).cpu().numpy().tobytes()
        )
    return digest.hexdigest()
