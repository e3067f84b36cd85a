"""Keys and values of many rows: a buffer of slots a layer, one slot a row.

A row's tokens lie in its slot column by column and are read there: nothing is copied to read. After a choice only the
chosen branch stays, in place. Knows nothing of models, masks or attention.
"""

import math
import mmap
from collections.abc import Sequence

import torch

ROOM = 64  # columns added when the buffers are full, besides a quarter of what is needed


class SlotCache:
    """Buffers (slots, heads, columns, head width) for the keys and the values of each layer.

    Args:
        columns: room to begin with. On a CPU it costs nothing: memory is taken as tokens are written.
        starts: the slots from which on a system's rows lie, lowest first.
    """

    def __init__(self, slots: int, columns: int = 0, starts: Sequence[int] = (0,)) -> None:
        self.slots, self.columns, self.starts = slots, columns, starts
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def first_of(self, slot: int) -> int:
        """The first of the slots that this one lies among."""
        return max(start for start in self.starts if start <= slot)

    def reserve(self, columns: int) -> None:
        """Make room for so many columns."""
        if columns <= self.columns:
            return
        self.columns = columns + columns // 4 + ROOM
        for index, buffers in self.layers.items():
            self.layers[index] = tuple(_grown(buffer, self.columns) for buffer in buffers)

    def layer(self, index: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer; made at the first call for states such as `like` (1, heads, tokens, width)."""
        if index not in self.layers:
            shape = (self.slots, like.shape[1], self.columns, like.shape[3])
            self.layers[index] = (_zeros(shape, like), _zeros(shape, like))
        return self.layers[index]

    def move_columns(self, slots: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        """In each of these slots (n,) copy column source (n,) to column target (n,)."""
        for buffers in self.layers.values():
            for buffer in buffers:
                buffer[slots, :, target] = buffer[slots, :, source]

    def copy_slot(self, source: int, target: int, columns: int) -> None:
        """Copy the first columns of one slot to another."""
        for buffers in self.layers.values():
            for buffer in buffers:
                buffer[target, :, :columns] = buffer[source, :, :columns]


def _zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """On a CPU of pages that are mapped when they are first written to, and given back all at once.

    So a long row takes memory for itself, not for all slots, and buffers that come and go, each of another size, leave
    no holes in the heap: a run needs as much after a day as after a minute. torch.zeros writes to every page.
    """
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    pages = mmap.mmap(-1, math.prod(shape) * like.element_size(), flags=mmap.MAP_PRIVATE)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux may else map 2 MiB where a row writes a column
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)


def _grown(buffer: torch.Tensor, columns: int) -> torch.Tensor:
    grown = _zeros((*buffer.shape[:2], columns, buffer.shape[3]), buffer)
    grown[:, :, : buffer.shape[2]] = buffer
    return grown
