"""GuidedProcessor: System 2 as a logits processor of vLLM.

Logits arrive as System 1's, with logit bias, bad words and grammar applied; temperature, top-p and the other warpers
come later.
"""

import hashlib
import json
import os
from collections.abc import Sequence

import torch
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

from llm2.errors import UserError
from llm2.verifier.load import load_verifier, verifier_config
from llm2.vllm.checks import check_engine, check_request, describe_memory
from llm2.vllm.core import GuidedBatch, GuidedSequence, open_verifier, total
from llm2.vllm.plugin import register
from llm2.vllm.prefix_head import head_batch
from llm2.vllm.rows import RowProcessor
from llm2.vllm.settings import engine_settings, request_guidance

logger = init_logger("vllm.llm2")
register()  # workers import this module even if llm2 is not installed and has no entry points


class GuidedProcessor(RowProcessor):
    """Guides requests with `llm2_beta`, or all if the engine has a default; see `settings`."""

    def __init__(self, vllm_config, state, is_pin_memory: bool | None = None) -> None:
        """Args: `state` is V1's device, with `is_pin_memory`, or V2's LogitsProcRequestState."""
        super().__init__(state, is_pin_memory)
        check_engine(vllm_config)
        self.settings = engine_settings(vllm_config.additional_config)
        self.rank, self.step, self.log_file = get_tensor_model_parallel_rank(), 0, os.environ.get("LLM2_LOG")
        device = state if self.requests is None else state.device
        num_slots = vllm_config.scheduler_config.max_num_seqs if self.requests is None else state.max_num_reqs
        self.batch = open_batch(vllm_config, self.settings.verifier, device, num_slots)

    @classmethod
    def validate_params(cls, sampling_params) -> None:
        """Raises ValueError, which a server answers with HTTP 400."""
        try:
            check_request(sampling_params)
        except UserError as error:
            raise ValueError(str(error)) from None

    def join(self, params, prompt: Sequence[int]) -> GuidedSequence | None:
        guidance = None if self.batch is None else request_guidance(params.extra_args, self.settings)
        return None if guidance is None else self.batch.join(guidance, prompt)

    def leave(self, state: GuidedSequence) -> None:
        self.batch.leave(state)

    def _commit_v1(self, num_rows: int) -> list[tuple[int, GuidedSequence]]:
        """Guided rows, after System 2 was told their new tokens."""
        rows = []
        for row, request in self.rows_v1(num_rows):
            prompt, output, handle = request.prompt, request.output, request.state.handle
            known = len(prompt) + len(output)
            if known < len(handle.token_ids):  # vLLM removed tokens
                self.batch.system2.rewind(handle, known)
            self.batch.system2.commit(handle, output[len(handle.token_ids) - len(prompt) :])
            rows.append((row, request.state))
        return rows

    def _commit_v2(self, ctx: LogitsContext) -> list[tuple[int, GuidedSequence]]:
        """The same; the new tokens are fetched in one copy."""
        rows, indices, positions = self.rows_v2(ctx), [], []
        if self.batch.system2.needs_tokens:
            for _, request, index, length in rows:
                unknown = range(len(request.state.handle.token_ids), length)
                indices += [index] * len(unknown)
                positions += unknown
        if positions:
            tokens = iter(self.requests.all_token_ids.gpu[indices, positions].tolist())
            for _, request, _, length in rows:
                handle = request.state.handle
                self.batch.system2.commit(handle, [next(tokens) for _ in range(len(handle.token_ids), length)])
        return [(row, request.state) for row, request, _, _ in rows]

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """Guide logits (rows, V) float32 in place."""
        rows = self._commit_v1(len(logits)) if ctx is None else self._commit_v2(ctx)
        if rows:
            self.batch.guide(logits, rows)
        if self.log_file is not None:
            self._log(logits)
        return logits

    def _log(self, logits: torch.Tensor) -> None:
        """Append a line for this step to the file LLM2_LOG, to compare ranks and to check that slots are freed."""
        digest = hashlib.blake2b(logits.cpu().numpy().tobytes(), digest_size=8).hexdigest()
        line = {"rank": self.rank, "step": self.step, "guided": len(self.followed), "logits": digest}
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
