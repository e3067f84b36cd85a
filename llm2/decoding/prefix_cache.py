"""Prompts that begin alike: what they have in common is read once, into a slot of its own, the trunk.

Samples of one prompt, rollouts from positions along one solution, and questions behind the same examples all share most
of what they read. Knows which prompt goes with which trunk, and which slots trunks have; how a trunk is read is the
business of `generation` and `attention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

SHORTEST = 16  # common tokens from which sharing is worth its keeping of books


@dataclass(eq=False)
class Trunk:
    """Tokens in a slot of their own."""

    slot: int
    ids: list[int]
    users: int = 0  # rows that read it in place
    readers: set[int] = field(default_factory=set)  # systems that have read it, 1 and 2


class Trunks:
    """The trunks of a decoding, in slots first .. first + count - 1; unused ones make room for new ones."""

    def __init__(self, first: int, count: int) -> None:
        self.free, self.known = list(range(first, first + count)), []

    def of(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[int], index: int, ahead: int
    ) -> tuple[Trunk, int, int] | None:
        """The trunk for a prompt: with how many of its tokens, and how many rows (of this prompt and the next ones).

        Args:
            prompts: of which those from `index` on are waiting.
            rows: how many rows each of them will be.
            ahead: rows to look ahead for.

        Returns None where too little is shared. At least the last token of a prompt is left to its rows.
        """
        prompt = prompts[index]
        least = max(SHORTEST, len(prompt) // 2)
        count, next_ = rows[index], index + 1
        while count < ahead and next_ < len(prompts) and common_prefix(prompt, prompts[next_]) >= least:
            count, next_ = count + rows[next_], next_ + 1
        best = max(self.known, key=lambda trunk: common_prefix(trunk.ids, prompt), default=None)
        if best is not None:
            bound = min(common_prefix(best.ids, prompt), len(prompt) - 1)
            if bound >= least:
                return best, bound, count
        if count < 2 or len(prompt) <= least or not (self.free or self._evict()):
            return None
        trunk = Trunk(self.free.pop(), list(prompt[:-1]))
        self.known.append(trunk)
        return trunk, len(trunk.ids), count

    def _evict(self) -> bool:
        """Give up the oldest trunk that no row reads."""
        for trunk in self.known:
            if not trunk.users:
                self.known.remove(trunk)
                self.free.append(trunk.slot)
                return True
        return False


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens are the same; slices are compared, which is quicker than token by token."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if list(a[low:middle]) == list(b[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low
