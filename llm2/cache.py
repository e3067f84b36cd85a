"""Keys and values of many rows: a buffer of slots a layer, one slot a row.

A row's tokens lie in its slot column by column and are read there: nothing is copied to read. After a choice only the
chosen branch stays, in place. Knows nothing of models, masks or attention.
"""

from collections.abc import Sequence

import torch

ROOM = 64  # columns added when the buffers are full, besides a quarter of what is needed


class SlotCache:
    """Buffers (slots, heads, columns, head width) for the keys and the values of each layer.

    Args:
        starts: the slots from which on a system's rows lie, lowest first.
    """

    def __init__(self, slots: int, starts: Sequence[int] = (0,)) -> None:
        self.slots, self.starts, self.columns = slots, starts, 0
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def first_of(self, slot: int) -> int:
        """The first of the slots that this one lies among."""
        return max(start for start in self.starts if start <= slot)

    def reserve(self, columns: int) -> None:
        """Make room for so many columns."""
        if columns <= self.columns:
            return
        more = columns + columns // 4 + ROOM - self.columns
        self.columns += more
        for index, buffers in self.layers.items():
            self.layers[index] = tuple(torch.nn.functional.pad(buffer, (0, 0, 0, more)) for buffer in buffers)

    def layer(self, index: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer; made at the first call for states such as `like` (1, heads, tokens, width)."""
        if index not in self.layers:
            shape = (self.slots, like.shape[1], self.columns, like.shape[3])
            self.layers[index] = (like.new_zeros(shape), like.new_zeros(shape))
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
