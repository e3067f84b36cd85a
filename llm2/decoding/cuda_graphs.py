"""CUDA graphs: forwards of a few fixed shapes, captured once and replayed.

A decoding step is short; on a GPU, launching its hundreds of kernels one by one takes longer than running them. A CUDA
graph launches them together, but always with the captured shapes and addresses. Inputs are therefore copied into a
static tensor. See torch.cuda.CUDAGraph.

All graphs of a device are captured on one stream, into one memory pool. cuBLAS keeps a workspace for that stream, which
lies in the pool, and destroying any graph may free it (pytorch issues 175276 and 193402). So nothing else runs on that
stream, and where one graph has to go, because its cache has moved or is gone, all of the device go, with the pool. One
thread at a time may decode with graphs on a device.
"""

import weakref
from collections.abc import Callable, Hashable

import torch

from llm2.decoding.kv_cache import Placement, SlotCache
from llm2.errors import UserError

MAX_GRAPHS = 512  # keys met after that many run eagerly

Run = Callable[[torch.Tensor], torch.Tensor]


class CapturedGraph:
    """A function of one tensor on a GPU, captured as a CUDA graph. It must have run on the GPU before."""

    def __init__(self, run: Run, inputs: torch.Tensor, graphs: "CUDAGraphs") -> None:
        self.inputs, self.graph = inputs.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.device(inputs.device):
            if graphs.stream is None:
                graphs.stream = torch.cuda.Stream()
            if graphs.pool is None:
                graphs.pool = torch.cuda.graph_pool_handle()
            current, options = torch.cuda.current_stream(), {"pool": graphs.pool, "stream": graphs.stream}
            try:
                with torch.cuda.graph(self.graph, **options, capture_error_mode="thread_local"):
                    self.output = run(self.inputs)
            finally:  # a failed capture leaves its own stream current
                torch.cuda.set_stream(current)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        self.inputs.copy_(inputs)
        self.graph.replay()
        return self.output.clone()  # other graphs reuse its memory


class EagerReplay:
    """Stands in for CapturedGraph off the GPU, for tests: reruns the first function of a key with static inputs."""

    def __init__(self, run: Run, inputs: torch.Tensor, graphs: "CUDAGraphs") -> None:
        self.run, self.inputs = run, inputs.clone()

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        self.inputs.copy_(inputs)
        return self.run(self.inputs)


class CUDAGraphs:
    """All graphs of a device: runs functions by key, captures each at its second call and replays it from then on."""

    _of_gpu: dict[torch.device, "CUDAGraphs"] = {}

    def __init__(self, capture: type[CapturedGraph | EagerReplay] = EagerReplay) -> None:
        self.capture = capture
        self.stream: torch.cuda.Stream | None = None
        self.pool: tuple | None = None
        self.graphs: dict[tuple[int, Hashable], CapturedGraph | EagerReplay | None] = {}  # by placement and key
        self.placements: dict[int, weakref.ref[Placement]] = {}
        self.replays = 0

    @classmethod
    def of(cls, device: torch.device) -> "CUDAGraphs":
        """Those of a GPU; on a CPU new ones, which rerun functions with static inputs."""
        return cls._of_gpu.setdefault(device, cls(CapturedGraph)) if device.type == "cuda" else cls()

    def knows(self, cache: SlotCache) -> bool:
        """Whether functions that use this cache have run, and their graphs have not been dropped since."""
        return self.placements.get(id(cache.placement), lambda: None)() is not None

    def __call__(self, cache: SlotCache, key: Hashable, run: Run, inputs: torch.Tensor) -> torch.Tensor:
        """run(inputs), which must depend on the cache's buffers, the key and the tensor alone."""
        if any(placement() is None for placement in self.placements.values()):
            self.drop()
        self.placements.setdefault(id(cache.placement), weakref.ref(cache.placement))
        key = id(cache.placement), key
        if key not in self.graphs:  # many shapes occur only once: not worth a capture
            if len(self.graphs) < MAX_GRAPHS:
                self.graphs[key] = None
            return run(inputs)
        if self.graphs[key] is None:
            try:
                self.graphs[key] = self.capture(run, inputs, self)
            except RuntimeError as error:
                raise UserError(
                    f"capturing a CUDA graph failed ({str(error).strip().splitlines()[0]}), after which torch's memory "
                    "on this GPU is not to be relied on (torch <= 2.11); start again with graphs=False"
                ) from error
        self.replays += 1
        return self.graphs[key](inputs)

    def drop(self) -> None:
        """Forget all graphs, and begin a new pool."""
        if self.stream is not None:
            torch.cuda.synchronize(self.stream.device)  # a replay may be under way
        self.graphs, self.placements, self.pool = {}, {}, None


def bucket(size: int, steps: int) -> int:
    """Round up to one of `steps` evenly spaced sizes between two powers of two, the upper one included."""
    step = max(1, 2 ** (size - 1).bit_length() // (2 * steps))
    return -(-size // step) * step
