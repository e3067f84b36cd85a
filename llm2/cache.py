"""A KV cache of slots, one a row being written, each with its own length. A transformers `Cache`.

Rows of unequal length share a forward: each token goes to the column it is told (`place`), and what attention reads is
a view of the buffers, not a copy. After a choice only the chosen branch stays, in place. A row that is done leaves by
another being moved into its slot, so that the busy slots are always the first ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

ROOM = 64  # columns added when the buffers are full, besides a quarter of what is needed


@dataclass
class Place:
    """Where the next forward's tokens go; all layers share one."""

    slots: int  # capacity
    rows: slice | torch.Tensor | None = None  # slots of the forward's rows; a slice is read without a copy
    columns: torch.Tensor | None = None  # (rows, tokens)
    width: int = 0  # columns that attention may read


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, (slots, heads, columns, head width)."""

    is_compileable = False
    is_sliding = False

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = (
            states.new_zeros(self.place.slots, states.shape[1], 0, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States (rows, heads, tokens, head width) of the forward -> keys and values of all columns up to the width."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.place.width > self.keys.shape[2]:
            more = self.place.width + self.place.width // 4 + ROOM - self.keys.shape[2]
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, more))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, more))
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, buffer: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        rows, columns = self.place.rows, self.place.columns
        slots = torch.arange(rows.start, rows.stop, device=buffer.device) if isinstance(rows, slice) else rows
        buffer[slots[:, None], :, columns] = states.transpose(1, 2)  # (rows, tokens, heads, head width)
        return buffer[rows, :, : self.place.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.width, 0

    def get_seq_length(self) -> int:
        return self.place.width

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """All layers of one model."""

    def __init__(self, slots: int) -> None:
        self.place = Place(slots)
        super().__init__(layer_class_to_replicate=lambda: SlotLayer(self.place))

    def aim(self, rows: slice | torch.Tensor, columns: torch.Tensor, width: int) -> None:
        """Tell where the tokens of the next forward go: columns (rows, tokens), all below width."""
        self.place.rows, self.place.columns, self.place.width = rows, columns, width

    def move_column(self, rows: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        """In each of these slots (n,) copy column source (n,) to column target (n,)."""
        for states in self._buffers():
            states[rows, :, target] = states[rows, :, source]

    def copy_rows(self, source: torch.Tensor, target: torch.Tensor, width: int) -> None:
        """Copy the first columns of slots source (n,) to slots target (n,)."""
        for states in self._buffers():
            states[target, :, :width] = states[source, :, :width]

    def _buffers(self) -> Iterable[torch.Tensor]:
        return (states for layer in self.layers for states in (layer.keys, layer.values))
