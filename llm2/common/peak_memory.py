"""Peak memory of this process."""

import resource
import sys

import torch

MIB = 2**20


def peak_rss_mib() -> float:
    """The largest resident set so far, in MiB, libraries included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MIB if sys.platform == "darwin" else 2**10)


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far in MiB: allocated on a GPU, else resident."""
    return torch.cuda.max_memory_allocated() / MIB if device.type == "cuda" else peak_rss_mib()
