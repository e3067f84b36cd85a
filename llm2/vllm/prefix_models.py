"""vLLM's Llama and Qwen with states exposed to a prefix head; registered by `plugin.register`."""

import torch
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from llm2.verifier.load import verifier_config
from llm2.vllm.checks import check_engine
from llm2.vllm.prefix_head import head_batch, load_head
from llm2.vllm.settings import engine_settings


class ShowsStates:
    """Mixin that passes the states of `compute_logits` to the prefix head."""

    def __init__(self, *, vllm_config, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        check_engine(vllm_config)
        settings = engine_settings(vllm_config.additional_config)
        self.batch = head_batch()
        self.batch.head = load_head(settings.verifier, verifier_config(settings.verifier))
        self.batch.head.to(next(self.parameters()).device)
        self.batch.embed = self.embed_input_ids
        by_processor = bool(vllm_config.model_config.logits_processors)
        self.always = None if by_processor or settings.default is None else self.batch.join(settings.default, ())

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits = super().compute_logits(hidden_states)
        self.batch.shown = hidden_states
        if logits is not None and self.always is not None:
            logits = logits.float()
            self.batch.guide(logits, [(row, self.always) for row in range(len(logits))])
        return logits


class LLM2LlamaForCausalLM(ShowsStates, LlamaForCausalLM):
    """vLLM's Llama with its states exposed to a prefix head."""


class LLM2Qwen2ForCausalLM(ShowsStates, Qwen2ForCausalLM):
    """vLLM's Qwen2 with its states exposed to a prefix head."""


class LLM2Qwen3ForCausalLM(ShowsStates, Qwen3ForCausalLM):
    """vLLM's Qwen3 with its states exposed to a prefix head."""
