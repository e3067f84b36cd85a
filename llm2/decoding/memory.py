"""How much of a GPU's memory decoding takes, and how many sequences fit.

A cache on a GPU gets its final size at once: growing copies it and drops the CUDA graphs that read it. On a CPU, pages
that are not written take no memory, so nothing is planned there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llm2.common.architecture import backbone_class, examine

CACHE_SHARE = 0.8  # of the free memory; the rest is for a forward's activations and for the logits of prompts
LOGITS_COPIES = 4  # float32 logits of every sequence that exist at the same time
AUTO_ROWS = 64  # sequences in flight for batch_size `auto` on a CPU
MAX_AUTO_ROWS = 256  # and at most so many on a GPU
GB = 1e9


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes of the caches. Bytes are zero where nothing is planned."""

    rows: int  # sequences in flight
    capacity: int  # positions of each slot
    prefixes: int  # slots for prefixes that sequences share
    cache_bytes: int = 0
    free_bytes: int = 0  # before the caches are allocated

    def __str__(self) -> str:
        return (
            f"{self.cache_bytes / GB:.2f} GB of caches for {self.rows} sequences of {self.capacity} tokens, "
            f"{self.free_bytes / GB:.2f} GB free before"
        )


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU, with what torch holds without using it; None on a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def position_bytes(config: PreTrainedConfig, dtype: torch.dtype, model: type[PreTrainedModel] | None = None) -> int:
    """Bytes of the keys and values of one token, as a dry run finds them; `model` is AutoModel's choice when None."""
    return examine(model or backbone_class(config), config).values_per_token * dtype.itemsize


def addresses(*modules: nn.Module) -> dict[int, int]:
    """Address and bytes of all weights, shared ones once."""
    return {parameter.data_ptr(): parameter.nbytes for module in modules for parameter in module.parameters()}


def num_prefix_slots(rows: int, free_of_charge: bool = False) -> int:
    """Slots for prefixes that sequences share; as many as there can be at once where unused ones take no memory."""
    return max(1, rows // (2 if free_of_charge else 8))


def plan_memory(
    bodies: Sequence[PreTrainedModel], device: torch.device, batch_size: int | str, num_sequences: int, capacity: int
) -> MemoryPlan:
    """Sizes of the caches on a device.

    Args:
        bodies: the models that keep a cache, one entry each.
        batch_size: sequences in flight, or `auto`: as many as fit.
        num_sequences: of the whole request.
        capacity: positions of the longest sequence. Reduced if a given batch_size does not fit; a sequence that needs
            more makes its cache grow.
    """
    free = available_bytes(device)
    limit = (AUTO_ROWS if free is None else MAX_AUTO_ROWS) if batch_size == "auto" else batch_size
    rows = max(1, min(limit, num_sequences))
    if free is None:
        return MemoryPlan(rows, capacity, num_prefix_slots(rows, free_of_charge=True))
    per_position = sum(position_bytes(body.config, body.dtype, type(body)) for body in bodies)
    per_row = LOGITS_COPIES * 4 * bodies[0].config.get_text_config().vocab_size

    def fits(rows: int) -> int:
        """Positions that each slot can have."""
        return int((CACHE_SHARE * free - rows * per_row) / ((rows + num_prefix_slots(rows)) * per_position))

    if batch_size == "auto":
        while rows > 1 and fits(rows) < capacity:
            rows -= 1
    capacity = max(1, min(capacity, fits(rows)))
    prefixes = num_prefix_slots(rows)
    return MemoryPlan(rows, capacity, prefixes, (rows + prefixes) * capacity * per_position, free)
