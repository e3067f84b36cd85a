"""State that all calls of one decoder share: the runners of both systems, counts, caches."""

import logging
from collections import Counter
from dataclasses import dataclass, field

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from llm2.common.architecture import refuse_too_long
from llm2.decoding.kv_cache import SlotCache
from llm2.decoding.memory import GB, MemoryPlan, addresses, plan_memory
from llm2.decoding.model_runner import LMRunner, VerifierRunner
from llm2.decoding.sampling import Guidance
from llm2.decoding.system2 import System2
from llm2.decoding.system2.contrast import ContrastRunner
from llm2.decoding.system2.kinds import open_system2

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class DecoderState:
    """Both systems, the counts over all calls, and caches to reuse."""

    models: list[nn.Module]  # System 1 and a System 2 that is a model, as they were given
    lm: LMRunner
    # of System 2, the same SharedRunner as `lm` where they share forwards; None for a kind that runs no model
    verifier: VerifierRunner | ContrastRunner | None
    guidance: Guidance | None
    counts: Counter[str] = field(default_factory=Counter)
    saved_caches: tuple[MemoryPlan, SlotCache, SlotCache] | None = None
    stated: bool = False  # whether the memory has been stated
    weights: dict[int, int] = field(init=False)  # addresses and bytes when the runners were made
    adapters: list[tuple] = field(init=False)  # which were active and merged then

    def __post_init__(self) -> None:
        self.weights, self.adapters = addresses(*self.models), self._adapters()

    def _adapters(self) -> list[tuple]:
        layers = [layer for model in self.models for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
        return [(*layer.active_adapters, layer.disable_adapters, *layer.merged_adapters) for layer in layers]

    @property
    def moved(self) -> bool:
        """Whether the models' weights moved, were replaced, or changed where the runners hold copies of them, or other
        adapters are active or merged."""
        runners = {self.lm, self.verifier} - {None}
        copied = (snapshot for runner in runners for snapshot in runner.snapshots())
        changed = addresses(*self.models) != self.weights or self._adapters() != self.adapters
        return changed or any(snapshot.changed for snapshot in copied)

    @property
    def shared(self) -> bool:
        return self.lm is self.verifier

    def refuse_too_long(self, num_tokens: int, max_new_tokens: int, what: str) -> None:
        """Raise UserError, beginning with `what`, where prompt and new tokens do not fit the positions of a system."""
        for runner in {self.lm, self.verifier} - {None}:
            refuse_too_long(
                runner.body.config, num_tokens + max_new_tokens, f"{what} with max_new_tokens {max_new_tokens}"
            )

    def take_caches(
        self, batch_size: int | str, num_sequences: int, capacity: int
    ) -> tuple[MemoryPlan, SlotCache, SlotCache]:
        """Their sizes, and the caches of System 1 and of the verifier, the same one where they share forwards.

        Saved caches are handed out once, so that two calls under way never write to the same ones.
        """
        saved, self.saved_caches = self.saved_caches, None
        rows = 1 if batch_size == "auto" else min(batch_size, num_sequences)
        if saved is not None and saved[0].rows >= rows and saved[0].capacity >= capacity:
            return saved
        del saved  # its memory is free for the new ones
        bodies = [runner.body for runner in (self.lm, self.verifier) if runner is not None]
        plan = plan_memory(bodies, self.lm.device, batch_size, num_sequences, capacity)
        if plan.free_bytes and not self.stated:
            logger.info("memory: %.2f GB of weights, %s", sum(self.weights.values()) / GB, plan)
            self.stated = True
        num_slots = plan.rows + plan.prefixes
        if self.shared:  # the verifier has the second half
            cache = SlotCache(2 * num_slots, plan.capacity, (0, num_slots))
            return plan, cache, cache
        return plan, SlotCache(num_slots, plan.capacity), SlotCache(num_slots, plan.capacity)

    def open_system2(self, plan: MemoryPlan, cache: SlotCache) -> System2:
        """System 2 for the sequences of one call, in its part of a cache."""
        num_slots = plan.rows + plan.prefixes
        first = num_slots if self.shared else 0
        return open_system2(self.guidance.verifier, self.verifier, cache, range(first, first + num_slots), self.counts)
