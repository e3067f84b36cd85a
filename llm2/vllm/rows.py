"""Base of our logits processors for vLLM: follows requests through the interfaces of both of its model runners.

V1 reports which requests were added, removed and moved (`update_state`) and passes their tokens as lists; V2 gives each
request a fixed index (`add_request`) and passes tokens and positions as arrays (`apply` with a context). A class that
inherits from both is accepted by both.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from inspect import signature
from typing import Any

import vllm
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from llm2.errors import UserError
from llm2.vllm.checks import TESTED

METHODS = {
    LogitsProcessorV1.update_state: ["self", "batch_update"],
    LogitsProcessorV1.apply: ["self", "logits"],
    LogitsProcessorV2.add_request: ["self", "req_idx", "sampling_params"],
    LogitsProcessorV2.apply: ["self", "logits", "ctx"],
}
FIELDS = {
    BatchUpdate: {"removed", "added", "moved"},
    LogitsProcRequestState: {"device", "max_num_reqs", "all_token_ids", "prefill_len"},
    LogitsContext: {"idx_mapping_np", "seq_lens_upper_bound_np"},
}


@dataclass(eq=False)
class Followed:
    """A request that a processor acts on."""

    state: Any  # what `join` returned
    prompt: Sequence[int] = ()  # V1's
    output: Sequence[int] = ()  # V1's, which grows


class RowProcessor(LogitsProcessorV1, LogitsProcessorV2):
    """`join` says what a processor keeps of a request, None if it does not act on it; `leave` gets it back."""

    def __init__(self, state: Any, is_pin_memory: bool | None) -> None:
        """Args: `state` is V1's device, with `is_pin_memory`, or V2's LogitsProcRequestState."""
        check_interfaces(type(self))
        self.requests = state if is_pin_memory is None else None  # V2's
        self.followed: dict[int, Followed] = {}  # by V1's row or V2's index

    @abstractmethod
    def join(self, params: Any, prompt: Sequence[int]) -> Any | None: ...

    def leave(self, state: Any) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._leave(row)
        for row, params, prompt, output in batch_update.added:
            self._follow(row, params, prompt, output)
        for source, target, direction in batch_update.moved:
            swapped = self.followed.pop(target, None) if direction == MoveDirectionality.SWAP else self._leave(target)
            for row, request in ((target, self.followed.pop(source, None)), (source, swapped)):
                if request is not None:
                    self.followed[row] = request

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Whether the processor acts on this request. V2 skips `apply` in steps without such requests."""
        return self._follow(req_idx, sampling_params)

    def rows_v1(self, num_rows: int) -> list[tuple[int, Followed]]:
        return [(row, request) for row, request in self.followed.items() if row < num_rows]

    def rows_v2(self, ctx: LogitsContext) -> list[tuple[int, Followed, int, int]]:
        """(row, request, V2's index, tokens so far) of requests past their prompt."""
        rows, lengths = [], ctx.seq_lens_upper_bound_np.tolist()  # exact without speculative decoding
        for row, index in enumerate(ctx.idx_mapping_np.tolist()):
            request = self.followed.get(index)
            if request is not None and lengths[row] >= self.requests.prefill_len.np[index]:
                rows.append((row, request, index, lengths[row]))
        return rows

    def _follow(self, key: int, params: Any, prompt: Sequence[int] = (), output: Sequence[int] = ()) -> bool:
        self._leave(key)
        if (state := self.join(params, prompt)) is None:
            return False
        self.followed[key] = Followed(state, prompt, output)
        return True

    def _leave(self, key: int) -> None:
        if (request := self.followed.pop(key, None)) is not None:
            self.leave(request.state)


def check_interfaces(processor: type) -> None:
    """Raise UserError if this vLLM's interfaces differ from the tested ones, or have more than the processor."""
    changed = [method.__qualname__ for method, names in METHODS.items() if list(signature(method).parameters) != names]
    changed += [c.__name__ for c, names in FIELDS.items() if not names <= {field.name for field in fields(c)}]
    changed += sorted(processor.__abstractmethods__)
    if changed:
        raise UserError(f"vLLM {vllm.__version__} changed {', '.join(changed)}; guidance was tested with vLLM {TESTED}")
