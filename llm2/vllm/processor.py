"""GuidedProcessor: System 2 as a logits processor of vLLM, for the interfaces of both of its model runners.

V1 reports which requests were added, removed and moved (`update_state`) and passes their tokens as lists; V2 gives each
request a fixed index (`add_request`) and passes tokens and positions as arrays (`apply` with a context). A class that
inherits from both is accepted by both. Logits arrive as System 1's, with logit bias, bad words and grammar applied;
temperature, top-p and the other warpers come later.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import fields
from inspect import signature

import torch
import vllm
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from llm2.errors import UserError
from llm2.verifier.load import load_verifier, verifier_config
from llm2.vllm.checks import TESTED, check_engine, check_request, describe_memory
from llm2.vllm.core import GuidedBatch, GuidedSequence, open_verifier, total
from llm2.vllm.plugin import register
from llm2.vllm.prefix_head import head_batch
from llm2.vllm.settings import engine_settings, request_guidance

logger = init_logger("vllm.llm2")
register()  # workers import this module even if llm2 is not installed and has no entry points

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


class GuidedProcessor(LogitsProcessorV1, LogitsProcessorV2):
    """Guides requests with `llm2_beta`, or all if the engine has a default; see `settings`."""

    def __init__(self, vllm_config, state, is_pin_memory: bool | None = None) -> None:
        """Args: `state` is V1's device, with `is_pin_memory`, or V2's LogitsProcRequestState."""
        check_interfaces()
        check_engine(vllm_config)
        self.settings = engine_settings(vllm_config.additional_config)
        self.rank, self.step, self.log_file = get_tensor_model_parallel_rank(), 0, os.environ.get("LLM2_LOG")
        self.requests = state if is_pin_memory is None else None  # V2's
        device = state if self.requests is None else state.device
        num_slots = vllm_config.scheduler_config.max_num_seqs if self.requests is None else state.max_num_reqs
        self.batch = open_batch(vllm_config, self.settings.verifier, device, num_slots)
        self.guided: dict[int, GuidedSequence] = {}  # by V1's row or V2's index
        self.tokens: dict[GuidedSequence, tuple[Sequence[int], Sequence[int]]] = {}  # V1's prompt and growing output

    @classmethod
    def validate_params(cls, sampling_params) -> None:
        """Raises ValueError, which a server answers with HTTP 400."""
        try:
            check_request(sampling_params)
        except UserError as error:
            raise ValueError(str(error)) from None

    def is_argmax_invariant(self) -> bool:
        return False

    # V1

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._leave(row)
        for row, params, prompt, output in batch_update.added:
            self._leave(row)
            if (sequence := self._join(row, params, prompt)) is not None:
                self.tokens[sequence] = (prompt, output)
        for source, target, direction in batch_update.moved:
            swapped = self.guided.pop(target, None) if direction == MoveDirectionality.SWAP else self._leave(target)
            for row, sequence in ((target, self.guided.pop(source, None)), (source, swapped)):
                if sequence is not None:
                    self.guided[row] = sequence

    def _rows_v1(self, num_rows: int) -> list[tuple[int, GuidedSequence]]:
        rows = [(row, sequence) for row, sequence in self.guided.items() if row < num_rows]
        for _, sequence in rows:
            (prompt, output), handle = self.tokens[sequence], sequence.handle
            known = len(prompt) + len(output)
            if known < len(handle.token_ids):  # vLLM removed tokens
                self.batch.system2.rewind(handle, known)
            self.batch.system2.commit(handle, output[len(handle.token_ids) - len(prompt) :])
        return rows

    # V2

    def add_request(self, req_idx: int, sampling_params) -> bool:
        """Whether this request is guided. V2 skips `apply` in steps without guided requests."""
        self._leave(req_idx)
        return self._join(req_idx, sampling_params, ()) is not None

    def _rows_v2(self, ctx: LogitsContext) -> list[tuple[int, GuidedSequence]]:
        """Rows of requests past their prompt; their new tokens are fetched in one copy."""
        rows, indices, positions = [], [], []
        lengths = ctx.seq_lens_upper_bound_np.tolist()  # exact without speculative decoding
        for row, index in enumerate(ctx.idx_mapping_np.tolist()):
            sequence = self.guided.get(index)
            if sequence is not None and lengths[row] >= self.requests.prefill_len.np[index]:
                known = len(sequence.handle.token_ids)
                unknown = range(known, lengths[row]) if self.batch.system2.needs_tokens else ()
                rows.append((row, sequence))
                indices += [index] * len(unknown)
                positions += unknown
        if positions:
            tokens = iter(self.requests.all_token_ids.gpu[indices, positions].tolist())
            for row, sequence in rows:
                new = [next(tokens) for _ in range(len(sequence.handle.token_ids), lengths[row])]
                self.batch.system2.commit(sequence.handle, new)
        return rows

    # Both

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """Guide logits (rows, V) float32 in place."""
        rows = self._rows_v1(len(logits)) if ctx is None else self._rows_v2(ctx)
        if rows:
            self.batch.guide(logits, rows)
        if self.log_file is not None:
            self._log(logits)
        return logits

    def _join(self, key: int, params, prompt: Sequence[int]) -> GuidedSequence | None:
        guidance = None if self.batch is None else request_guidance(params.extra_args, self.settings)
        if guidance is None:
            return None
        sequence = self.guided[key] = self.batch.join(guidance, prompt)
        return sequence

    def _leave(self, key: int) -> None:
        if (sequence := self.guided.pop(key, None)) is not None:
            self.tokens.pop(sequence, None)
            self.batch.leave(sequence)

    def _log(self, logits: torch.Tensor) -> None:
        """Append a line for this step to the file LLM2_LOG, to compare ranks and to check that slots are freed."""
        digest = hashlib.blake2b(logits.cpu().numpy().tobytes(), digest_size=8).hexdigest()
        line = {"rank": self.rank, "step": self.step, "guided": len(self.guided), "logits": digest}
        if self.batch.system2.runs_model:
            line |= {"free_slots": len(self.batch.system2.free_slots), "tokens_read": total["system2_tokens"]}
        with open(self.log_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.step += 1


def open_batch(vllm_config, verifier: str, device: torch.device, num_slots: int) -> GuidedBatch | None:
    """Load System 2 and allocate its memory; None on pipeline ranks without logits."""
    if not get_pp_group().is_last_rank:
        return None
    model, config = vllm_config.model_config, verifier_config(verifier)
    if config.is_head:
        return head_batch()
    memory = describe_memory(config, model.dtype, num_slots, model.max_model_len)
    logger.info(memory)
    dtype = str(model.dtype).removeprefix("torch.")
    max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
    try:
        system2 = load_verifier(verifier, torch.device(device), dtype, model.hf_text_config.vocab_size).merge()
        return GuidedBatch(open_verifier(system2, num_slots, model.max_model_len, max_tokens))
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory: {memory}") from None


def check_interfaces() -> None:
    """Raise UserError if this vLLM's interfaces differ from the tested ones."""
    changed = [method.__qualname__ for method, names in METHODS.items() if list(signature(method).parameters) != names]
    changed += [c.__name__ for c, names in FIELDS.items() if not names <= {field.name for field in fields(c)}]
    changed += sorted(GuidedProcessor.__abstractmethods__)
    if changed:
        raise UserError(f"vLLM {vllm.__version__} changed {', '.join(changed)}; guidance was tested with vLLM {TESTED}")
