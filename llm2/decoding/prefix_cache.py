"""Prefixes that several prompts share, each computed once, in a cache slot of its own.

Samples of one prompt, rollouts along one solution and questions behind the same few-shot examples share most of their
tokens. This module decides which prompts share which prefix, and in which slot it lies.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from llm2.common.prefix import common_prefix
from llm2.decoding.sampling import Prompt

MIN_PREFIX_TOKENS = 16  # shorter prefixes are not shared


@dataclass(eq=False)
class SharedPrefix:
    """Tokens held in a slot of their own. Longer prompts that begin with all of them append theirs."""

    slot: int
    token_ids: list[int]
    ref_count: int = 0  # sequences that read it in place
    num_cached: int = 0  # tokens whose keys and values the slot holds


class PrefixCache:
    """Shared prefixes in `num_slots` slots from `first_slot` on; of those without readers the one that was matched
    longest ago makes room for a new one."""

    def __init__(self, first_slot: int, num_slots: int) -> None:
        self.free_slots, self.prefixes = list(range(first_slot, first_slot + num_slots)), []

    def match(
        self, prompt: Prompt, following: Iterable[Prompt], lookahead: int
    ) -> tuple[SharedPrefix, int, int] | None:
        """The shared prefix for a prompt, found or new.

        Args:
            following: the prompts that wait behind it.
            lookahead: stop counting at this many sequences.

        Returns:
            The prefix, how many of its tokens this prompt shares, and how many waiting sequences share them; or None
            where sharing does not pay. A prompt's last token is never shared: its hidden state is needed.
        """
        ids, num_sharing = prompt.token_ids, len(prompt.seeds)
        min_shared = max(MIN_PREFIX_TOKENS, len(ids) // 2)
        for other in following:
            if num_sharing >= lookahead or common_prefix(ids, other.token_ids) < min_shared:
                break
            num_sharing += len(other.seeds)
        best = max(self.prefixes, key=lambda prefix: common_prefix(prefix.token_ids, ids), default=None)
        if best is not None and (length := min(common_prefix(best.token_ids, ids), len(ids) - 1)) >= min_shared:
            if length == len(best.token_ids) and num_sharing > 1:
                best.token_ids += ids[length:-1]
                length = len(ids) - 1
            self.prefixes.remove(best)
            self.prefixes.append(best)
            return best, length, num_sharing
        if num_sharing < 2 or len(ids) <= min_shared or not (self.free_slots or self._evict()):
            return None
        prefix = SharedPrefix(self.free_slots.pop(), list(ids[:-1]))
        self.prefixes.append(prefix)
        return prefix, len(prefix.token_ids), num_sharing

    def _evict(self) -> bool:
        """Free the slot of the prefix without readers that was matched longest ago, if there is one."""
        for prefix in self.prefixes:
            if not prefix.ref_count:
                self.prefixes.remove(prefix)
                self.free_slots.append(prefix.slot)
                return True
        return False
