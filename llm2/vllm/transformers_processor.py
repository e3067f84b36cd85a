"""TransformersProcessor: a transformers LogitsProcessor in vLLM, such as `llm2.decoding.arithmetic:Arithmetic`.

The engine's key `llm2_logits_processor` names it as MODULE:CLASS. It acts on every request, before guidance.
"""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

from llm2.common.loading import load_tokenizer
from llm2.decoding.processing import load_processor, process_each
from llm2.vllm.checks import check_order, check_rows
from llm2.vllm.rows import RowProcessor
from llm2.vllm.settings import processor_name


class TransformersProcessor(RowProcessor):
    """Makes the processor with the engine's tokenizer and hands it each row with all its tokens, the prompt's too."""

    def __init__(self, vllm_config: Any, state: Any, is_pin_memory: bool | None = None) -> None:
        super().__init__(state, is_pin_memory)
        check_rows(vllm_config)
        check_order(vllm_config.model_config)
        tokenizer = load_tokenizer(vllm_config.model_config.tokenizer)
        self.processor = load_processor(processor_name(vllm_config.additional_config), tokenizer)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        pass

    def join(self, params: Any, prompt: Sequence[int]) -> bool:
        return True

    @torch.inference_mode()
    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """Change logits (rows, V) float32 in place."""
        found = self._texts_v1(len(logits)) if ctx is None else self._texts_v2(ctx)
        if found:
            rows = [row for row, _ in found]
            logits[rows] = process_each(self.processor, [ids for _, ids in found], logits[rows])
        return logits

    def _texts_v1(self, num_rows: int) -> list[tuple[int, list[int]]]:
        return [(row, [*request.prompt, *request.output]) for row, request in self.rows_v1(num_rows)]

    def _texts_v2(self, ctx: LogitsContext) -> list[tuple[int, list[int]]]:
        """The tokens are fetched in one copy."""
        rows = self.rows_v2(ctx)
        longest = max((length for *_, length in rows), default=0)
        ids = self.requests.all_token_ids.gpu[[index for _, _, index, _ in rows], :longest].tolist() if rows else []
        return [(row, text[:length]) for (row, _, _, length), text in zip(rows, ids, strict=True)]
