"""Prefixes that several prompts share, each computed once, in a cache slot of its own.

Samples of one prompt, rollouts along one solution and questions behind the same few-shot examples share most of their
tokens. This module decides which prompts share which prefix, and in which slot it lies.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from llm2.common.prefix import common_prefix

MIN_PREFIX_TOKENS = 16  # shorter prefixes are not shared


@dataclass(eq=False)
class SharedPrefix:
    """Tokens held in a slot of their own."""

    slot: int
    token_ids: list[int]
    ref_count: int = 0  # sequences that read it in place
    prefilled_by: set[str] = field(default_factory=set)  # systems whose keys and values the slot holds


class PrefixCache:
    """Shared prefixes in `num_slots` slots from `first_slot` on; the oldest unused one makes room for a new one."""

    def __init__(self, first_slot: int, num_slots: int) -> None:
        self.free_slots, self.prefixes = list(range(first_slot, first_slot + num_slots)), []

    def match(
        self, prompts: Sequence[Sequence[int]], num_samples: Sequence[int], index: int, lookahead: int
    ) -> tuple[SharedPrefix, int, int] | None:
        """The shared prefix for prompt `index`, found or new.

        Args:
            prompts: those from `index` on are waiting.
            num_samples: sequences per prompt.
            lookahead: stop counting at this many sequences.

        Returns:
            The prefix, how many of its tokens this prompt shares, and how many waiting sequences share them; or None
            where sharing does not pay. A prompt's last token is never shared: its hidden state is needed.
        """
        prompt = prompts[index]
        min_shared = max(MIN_PREFIX_TOKENS, len(prompt) // 2)
        num_sharing, following = num_samples[index], index + 1
        while (
            num_sharing < lookahead
            and following < len(prompts)
            and common_prefix(prompt, prompts[following]) >= min_shared
        ):
            num_sharing, following = num_sharing + num_samples[following], following + 1
        best = max(self.prefixes, key=lambda prefix: common_prefix(prefix.token_ids, prompt), default=None)
        if best is not None:
            length = min(common_prefix(best.token_ids, prompt), len(prompt) - 1)
            if length >= min_shared:
                return best, length, num_sharing
        if num_sharing < 2 or len(prompt) <= min_shared or not (self.free_slots or self._evict()):
            return None
        prefix = SharedPrefix(self.free_slots.pop(), list(prompt[:-1]))
        self.prefixes.append(prefix)
        return prefix, len(prefix.token_ids), num_sharing

    def _evict(self) -> bool:
        """Free the slot of the oldest prefix that no sequence reads, if there is one."""
        for prefix in self.prefixes:
            if not prefix.ref_count:
                self.prefixes.remove(prefix)
                self.free_slots.append(prefix.slot)
                return True
        return False
