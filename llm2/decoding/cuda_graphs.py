"""Forwards of a few fixed shapes, recorded once and replayed.

A step of decoding reads one token a row, or a few. On a GPU that takes less time than launching its hundreds of kernels
one by one; a CUDA graph launches them all at once. It repeats what was recorded to the letter: same shapes, same
addresses. So what a forward is about comes in through tensors that stay where they are, and the caches that it reads
and writes must stay where they are too.

Knows nothing of models. Source: torch.cuda.CUDAGraph's documentation.
"""

import warnings
from collections.abc import Callable, Hashable

import torch

LIMIT = 512  # recordings kept; shapes met after that many are run as they are

Run = Callable[[torch.Tensor], torch.Tensor]


class Graph:
    """A function of one tensor on a GPU, recorded."""

    pools: dict[torch.device, tuple] = {}  # memory that all graphs of a device use in turn

    def __init__(self, run: Run, given: torch.Tensor) -> None:
        self.given = given.clone()
        with torch.cuda.device(given.device):
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):  # libraries set up their workspaces at the first call on a stream
                run(self.given)
            here.wait_stream(aside)
            pool = self.pools.setdefault(given.device, torch.cuda.graph_pool_handle())
            self.graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
                    self.output = run(self.given)
            finally:  # a recording that fails does not go back by itself
                torch.cuda.set_stream(here)

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        self.given.copy_(given)
        self.graph.replay()
        return self.output.clone()  # its memory is the other graphs' too


class Rerun:
    """The twin of a Graph for other devices: no quicker, but as strict about what may change from call to call."""

    def __init__(self, run: Run, given: torch.Tensor) -> None:
        self.run, self.given = run, given.clone()

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        self.given.copy_(given)
        return self.run(self.given)


class Recorder:
    """Runs functions, from the third time on as recordings.

    Args:
        device: on CUDA a recording is a Graph, elsewhere a Rerun.
    """

    def __init__(self, device: torch.device) -> None:
        self.record = Graph if device.type == "cuda" else Rerun
        self.basis: Hashable = None
        self.recordings: dict[Hashable, Graph | Rerun | None] = {}

    def rest_on(self, basis: Hashable) -> None:
        """What all recordings have their addresses from; where it is another one they are forgotten."""
        if basis != self.basis:
            self.basis, self.recordings = basis, {}

    def __call__(self, key: Hashable, run: Run, given: torch.Tensor) -> torch.Tensor:
        """run(given), which must depend on the key and the tensor alone."""
        if self.record is None or (key not in self.recordings and len(self.recordings) >= LIMIT):
            return run(given)
        if key not in self.recordings:  # many a shape is met only once
            self.recordings[key] = None
            return run(given)
        if self.recordings[key] is None:
            try:
                self.recordings[key] = self.record(run, given)
            except RuntimeError as error:
                warnings.warn(f"decoding goes on without CUDA graphs: recording one failed ({error})", stacklevel=2)
                self.record, self.recordings = None, {}
                return run(given)
        return self.recordings[key](given)


def rounded(number: int, sizes: int) -> int:
    """Up to the next of `sizes` evenly spaced numbers between one power of two and the next, that one included."""
    step = max(1, 2 ** (number - 1).bit_length() // (2 * sizes))
    return -(-number // step) * step
