"""Keys and values of many sequences: per layer one buffer of slots, one slot a sequence.

A sequence's tokens fill its slot from position 0 on and attention reads them there, without copying. Once a candidate
is chosen, its keys and values move to the sequence's next position; the other candidates are overwritten.
"""

import math
import mmap
from collections.abc import Sequence

import torch

HEADROOM = 64  # positions added when a cache grows, on top of a quarter of what is needed


class Placement:
    """Identity of a cache's buffers: replaced when they move, freed with the cache."""


class SlotCache:
    """Buffers (slots, heads, positions, head width) for the keys and the values of each layer.

    Args:
        capacity: positions of each slot to begin with. Free on a CPU: pages take memory when tokens are written.
        group_starts: first slot of each system's sequences, in ascending order.
    """

    def __init__(self, num_slots: int, capacity: int = 0, group_starts: Sequence[int] = (0,)) -> None:
        self.num_slots, self.capacity, self.group_starts = num_slots, capacity, group_starts
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.pages: dict[int, mmap.mmap] = {}  # of each buffer on a CPU, by its address
        self.placement = Placement()

    def group_start(self, slot: int) -> int:
        """First slot of the group that holds `slot`."""
        return max(start for start in self.group_starts if start <= slot)

    def reserve(self, capacity: int) -> None:
        """Grow the slots to at least `capacity` positions."""
        if capacity <= self.capacity:
            return
        self.capacity = capacity + capacity // 4 + HEADROOM
        self.placement = Placement()
        for index, buffers in self.layers.items():
            self.layers[index] = tuple(self._grow(buffer) for buffer in buffers)

    def layer(self, index: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, allocated at the first call for states like `like` (1, heads, tokens, width)."""
        if index not in self.layers:
            shape = (self.num_slots, like.shape[1], self.capacity, like.shape[3])
            self.layers[index] = (self._zeros(shape, like), self._zeros(shape, like))
        return self.layers[index]

    def release(self, start: int, stop: int) -> None:
        """Forget these slots and return their memory to the system; nothing happens on a GPU.

        A slot holds what its longest sequence wrote: without this, all slots end up as large as the longest of all.
        """
        for pages in self.pages.values():
            slot = len(pages) // self.num_slots
            first, last = -(-start * slot // mmap.PAGESIZE), stop * slot // mmap.PAGESIZE  # whole pages
            if first < last:
                pages.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)

    def move_positions(self, slots: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        """In each of these slots (n,) copy position source (n,) to position target (n,)."""
        for buffers in self.layers.values():
            for buffer in buffers:
                buffer[slots, :, target] = buffer[slots, :, source]

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for buffers in self.layers.values():
            for buffer in buffers:
                buffer[target, :, :length] = buffer[source, :, :length]

    def _zeros(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """Zeros; on a CPU, pages that are mapped at their first write and returned to the system as a whole.

        One long sequence then costs memory for its own slot alone, and buffers of changing sizes do not fragment the
        heap. torch.zeros would write to every page.
        """
        if like.device.type != "cpu":
            return like.new_zeros(shape)
        pages = mmap.mmap(-1, math.prod(shape) * like.element_size(), flags=mmap.MAP_PRIVATE)
        buffer = torch.frombuffer(pages, dtype=like.dtype).view(shape)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # otherwise Linux may map 2 MiB for a write to a single position
            pages.madvise(mmap.MADV_NOHUGEPAGE)
        if hasattr(mmap, "MADV_DONTNEED"):
            self.pages[buffer.data_ptr()] = pages
        return buffer

    def _grow(self, buffer: torch.Tensor) -> torch.Tensor:
        grown = self._zeros((*buffer.shape[:2], self.capacity, buffer.shape[3]), buffer)
        grown[:, :, : buffer.shape[2]] = buffer
        self.pages.pop(buffer.data_ptr(), None)
        return grown
