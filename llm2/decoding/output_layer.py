"""A prefix head as System 1's output layer: transformers' own `generate`, guided, in every mode that it has."""

import torch
from torch import nn
from transformers import PreTrainedModel

from llm2.common.loading import changes_logits
from llm2.decoding.candidates import check_scores, guided_logits, over_vocabulary, plausible
from llm2.decoding.model_runner import PassThrough
from llm2.decoding.sampling import Guidance
from llm2.decoding.system2 import Candidates
from llm2.decoding.system2.head import Head
from llm2.verifier.lora import clone_sharing_weights
from llm2.verifier.model import ProcessVerifier

FAR = 1e4


class GuidedOutputLayer(nn.Module):
    """System 1's output layer, then beta times the head's scores on the plausible tokens; all others are `FAR` below.

    Not -inf: a processor may forbid every plausible token, and the best of the others must then be left.
    """

    def __init__(self, output: nn.Module, guidance: Guidance) -> None:
        super().__init__()
        self.output, self.guidance, self.system2 = output, guidance, Head(guidance.verifier.prefix_scores)

    @property
    def weight(self) -> nn.Parameter:
        return self.output.weight

    @torch.no_grad()  # not inference_mode: `generate` changes logits in place
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., V) float32. Raises UserError for a score that is not finite."""
        guidance, logits = self.guidance, self.output(states).float().flatten(end_dim=-2)
        candidates, valid = plausible(logits, guidance.alpha, guidance.top_k)  # (n, K)
        values = logits.gather(-1, candidates)
        found = Candidates(candidates, valid, values, states.flatten(end_dim=-2))
        scores = self.system2.score([], found)
        check_scores(scores, candidates, valid)
        guided = guided_logits(values, valid, scores, guidance.beta)
        guided = over_vocabulary(logits, candidates, guided)
        return torch.where(guided.isinf(), logits - FAR, guided).view(*states.shape[:-1], -1)


def guided_model(system1: PreTrainedModel, guidance: Guidance) -> PreTrainedModel:
    """System 1, guided by a prefix head: a model of its class over its Parameters, for `generate` with beams, assisted
    decoding and whatever else transformers has. Its logits are the guided ones.

    Raises ValueError for another kind of verifier, and for models that change the logits behind their output layer, or
    the states before it.
    """
    if not (isinstance(guidance.verifier, ProcessVerifier) and guidance.verifier.config.is_head):
        raise ValueError("expected a prefix head: any other verifier has to read tokens; use LLM2 or Decoder")
    if (key := changes_logits(system1.config)) is not None:
        raise ValueError(f"{key} changes the logits behind the output layer; use LLM2 or Decoder")
    if not _reads_states(system1):
        raise ValueError(f"{type(system1).__name__} changes the states before its output layer; use LLM2 or Decoder")
    output = system1.get_output_embeddings()
    return clone_sharing_weights(system1, {output: GuidedOutputLayer(output, guidance)}).eval()


@torch.inference_mode()
def _reads_states(system1: PreTrainedModel) -> bool:
    """Whether the output layer is given the body's states, which a prefix head scores."""
    output = system1.get_output_embeddings()
    head = clone_sharing_weights(system1, {system1.base_model: PassThrough(), output: nn.Identity()}).eval()
    states = torch.ones(1, 1, output.weight.shape[-1], dtype=output.weight.dtype, device=output.weight.device)
    return torch.equal(head(inputs_embeds=states, use_cache=False).logits, states)
