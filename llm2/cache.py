"""A KV cache that grows in place, keeps one branch of several, and drops rows. A transformers `Cache`.

transformers' DynamicCache concatenates, which copies everything at each token; here a layer's keys and values lie in
buffers with room to spare, a step writes behind what is there, and what attention reads is a view.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

ROOM = 64  # columns added when a buffer is full; then also a quarter of its length


class GrowingLayer(CacheLayerMixin):
    """One layer's keys and values, (B, heads, capacity, head width), of which `length` columns are in use."""

    is_compileable = False
    is_sliding = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        if self.length > self.keys.shape[-2]:
            self._grow()
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def _grow(self) -> None:
        more = self.length + self.length // 4 + ROOM - self.keys.shape[-2]
        self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, more))
        self.values = torch.nn.functional.pad(self.values, (0, 0, 0, more))

    def keep_branch(self, branches: int, chosen: torch.Tensor) -> None:
        """Of the last `branches` columns keep the chosen one (B,) of each row."""
        first = self.length - branches
        rows = torch.arange(chosen.shape[0], device=chosen.device)
        for states in (self.keys, self.values):
            states[:, :, first] = states[rows, :, first + chosen]
        self.length = first + 1

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep these rows (R,), in this order, as often as they are named."""
        self.keys, self.values = self.keys[rows], self.values[rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class GrowingCache(Cache):
    """The layers of one model for one batch."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=GrowingLayer)

    def keep_branch(self, branches: int, chosen: torch.Tensor) -> None:
        for layer in self.layers:
            layer.keep_branch(branches, chosen)

    def select_rows(self, rows: torch.Tensor) -> None:
        for layer in self.layers:
            layer.select_rows(rows)
