"""A logits processor that vLLM loads through llm2's entry point, to check engines at start.

An engine whose keys name a verifier that nothing applies is refused, since requests with `llm2_beta` would get plain
answers. In all other engines this does nothing.
"""

from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1

from llm2.vllm.checks import require_applied

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2
except ImportError:  # an older vLLM, which must keep working without guidance
    LogitsProcessorV2 = object


class Guard(LogitsProcessorV1, LogitsProcessorV2):
    """Changes no logits."""

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        require_applied(vllm_config)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False

    def apply(self, logits: Any, ctx: Any = None) -> Any:
        return logits
