"""CUDA graphs: forwards of a few fixed shapes, captured once and replayed.

A decoding step is short; on a GPU, launching its hundreds of kernels one by one takes longer than running them. A CUDA
graph launches them together, but always with the captured shapes and addresses. Inputs are therefore copied into a
static tensor, and graphs are discarded when the caches they use move. See torch.cuda.CUDAGraph.
"""

import warnings
from collections.abc import Callable, Hashable

import torch

MAX_GRAPHS = 512  # keys met after that many run eagerly

Run = Callable[[torch.Tensor], torch.Tensor]


class CapturedGraph:
    """A function of one tensor on a GPU, captured as a CUDA graph."""

    pools: dict[torch.device, tuple] = {}  # one memory pool per device, shared by all its graphs

    def __init__(self, run: Run, inputs: torch.Tensor) -> None:
        self.inputs = inputs.clone()
        with torch.cuda.device(inputs.device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):  # libraries allocate workspaces at the first call on a stream
                run(self.inputs)
            current.wait_stream(side)
            pool = self.pools.setdefault(inputs.device, torch.cuda.graph_pool_handle())
            self.graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                    self.output = run(self.inputs)
            finally:  # a failed capture leaves its own stream current
                torch.cuda.set_stream(current)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        self.inputs.copy_(inputs)
        self.graph.replay()
        return self.output.clone()  # other graphs reuse its memory


class EagerReplay:
    """Stands in for CapturedGraph off the GPU, for tests: reruns the first function of a key with static inputs."""

    def __init__(self, run: Run, inputs: torch.Tensor) -> None:
        self.run, self.inputs = run, inputs.clone()

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        self.inputs.copy_(inputs)
        return self.run(self.inputs)


class CUDAGraphRunner:
    """Runs functions by key, captures each at its second call and replays it from then on.

    Args:
        device: on CUDA a function is captured, elsewhere rerun with static inputs.
    """

    def __init__(self, device: torch.device) -> None:
        self.capture = CapturedGraph if device.type == "cuda" else EagerReplay
        self.buffers: Hashable = None
        self.graphs: dict[Hashable, CapturedGraph | EagerReplay | None] = {}

    def invalidate_if_moved(self, buffers: Hashable) -> None:
        """Discard captured graphs when their buffers change."""
        if buffers != self.buffers:
            self.buffers, self.graphs = buffers, {}

    def __call__(self, key: Hashable, run: Run, inputs: torch.Tensor) -> torch.Tensor:
        """run(inputs), which must depend on the key and the tensor alone."""
        if self.capture is None or (key not in self.graphs and len(self.graphs) >= MAX_GRAPHS):
            return run(inputs)
        if key not in self.graphs:  # many shapes occur only once: not worth a capture
            self.graphs[key] = None
            return run(inputs)
        if self.graphs[key] is None:
            try:
                self.graphs[key] = self.capture(run, inputs)
            except RuntimeError as error:
                warnings.warn(f"continuing without CUDA graphs: capturing one failed ({error})", stacklevel=2)
                self.capture, self.graphs = None, {}
                return run(inputs)
        return self.graphs[key](inputs)


def bucket(size: int, steps: int) -> int:
    """Round up to one of `steps` evenly spaced sizes between two powers of two, the upper one included."""
    step = max(1, 2 ** (size - 1).bit_length() // (2 * steps))
    return -(-size // step) * step
