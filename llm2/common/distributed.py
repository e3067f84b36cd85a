"""Processes of a command: their start by `accelerate launch`, rank and world size, and work shared among them.

Processes exchange barriers and counters only; results go through files that all of them see.
"""

import gc
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any, NamedTuple

import torch
from torch.distributed.rendezvous import rendezvous

from llm2.config import OptimizerConfig
from llm2.errors import UserError

# What `accelerate launch` needs without a config file, on CPUs too; port 0 is any free one.
ONE_MACHINE = "--multi_gpu --same_network --num_machines 1 --machine_rank 0 --main_process_port 0 --mixed_precision no"
LAUNCHED = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "ACCELERATE_MIXED_PRECISION",
)  # the last one is set for a single process
WAIT = timedelta(days=30)  # for the slowest process; if one dies, the launcher ends the others
_calls = count()  # numbers the calls of iter_shared_work, alike in all processes


class DistInfo(NamedTuple):
    """Position of this process among those of the launcher."""

    rank: int
    world_size: int  # processes on all machines
    local_rank: int  # rank on this machine, which is its GPU
    local_world_size: int  # processes on this machine

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def dist_info() -> DistInfo:
    """Read from the launcher's environment variables; without a launcher, a single process."""
    single = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    return DistInfo(*(int(os.environ.get(name, value)) for name, value in single.items()))


def process_device(device: torch.device) -> torch.device:
    """This process's GPU if `device` is one; otherwise `device`, with the process pinned to its share of the cores."""
    if device.type == "cuda":
        return torch.device("cuda", dist_info().local_rank)
    pin_to_cores()
    return device


def pin_to_cores() -> None:
    """Pin this process to its share of the machine's cores, on Linux: processes that migrate slow each other down."""
    info = dist_info()
    if sys.platform != "linux" or info.local_world_size == 1:
        return
    cores = sorted(os.sched_getaffinity(0))
    if share := len(cores) // info.local_world_size:
        os.sched_setaffinity(0, cores[info.local_rank * share : (info.local_rank + 1) * share])


def barrier() -> None:
    """Wait for all processes; over gloo, since waiting needs no GPU."""
    info = dist_info()
    if info.world_size == 1:
        return
    if not torch.distributed.is_initialized():
        group = {"rank": info.rank, "world_size": info.world_size, "timeout": WAIT}
        torch.distributed.init_process_group("gloo", store=_store(), **group)
    torch.distributed.barrier()


def iter_shared_work(num_items: int) -> Iterator[int]:
    """Indices below `num_items` for this rank; each index is yielded on exactly one rank.

    A rank first takes its strided share (rank, rank + world_size, ...), then items that slower ranks have not started.
    All ranks must call this equally often.
    """
    info, call = dist_info(), next(_calls)
    if info.world_size == 1:
        yield from range(num_items)
        return
    for owner in ((info.rank + i) % info.world_size for i in range(info.world_size)):
        share = range(owner, num_items, info.world_size)
        while (taken := _store().add(f"work {call} share {owner}", 1)) <= len(share):
            yield share[taken - 1]


@cache
def _store() -> torch.distributed.Store:
    """The key-value store of all processes, which the launcher or rank 0 hosts."""
    store, _, _ = next(rendezvous("env://", timeout=WAIT))
    store.set_timeout(WAIT)
    return store


def destroy_group() -> None:
    """Destroy the process group, if there is one, after a last barrier; call it at the end of every process.

    Otherwise a thread that frees a tensor while Python shuts down can abort a process whose work is done.
    """
    if torch.distributed.is_initialized():
        gc.collect()  # tensors in reference cycles
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        _store.cache_clear()


def launch(config: Any, check: Callable[[Any], None], options: Namespace, arguments: Sequence[str]) -> None:
    """Replace this process by `accelerate launch` of `llm2 ARGUMENTS`, after `check`, if several processes are to run.

    Returns if one is enough, or if a launcher started this one.
    """
    if not os.environ.keys().isdisjoint(LAUNCHED):
        return
    processes, threads = resolve_parallelism(config, options.processes)
    file = options.accelerate_config
    if processes == 1 and not file:
        if isinstance(config, OptimizerConfig):  # the Trainer would multiply the batch by the GPUs that it sees
            os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
        return
    if file and not os.path.isfile(file):
        raise UserError(f"--accelerate-config: expected a file, found none at {file!r}")
    check(config)
    setting = f"--config_file {shlex.quote(file)}" if file else f"{ONE_MACHINE} --dynamo_backend no"
    sizes = f"--num_processes {processes} --num_cpu_threads_per_process {threads}"
    launcher = shlex.split(f"-m accelerate.commands.launch --quiet {setting} {sizes} {options.accelerate_args or ''}")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *launcher, "-m", "llm2", *arguments])


def resolve_parallelism(config: Any, number: str | None = None) -> tuple[int, int]:
    """Number of processes to start and threads of each, for the config of any command.

    By default one process for every `tensor_parallel` GPUs, and one where there is no GPU or where a server does the
    work. `number` overrides this; raises UserError unless it is a whole number from 1 on.
    """
    on_cpu = getattr(config, "device", "auto") == "cpu" or getattr(config, "server", None) is not None
    num_gpus = 0 if on_cpu else torch.cuda.device_count()
    if number and not (number.isdecimal() and int(number)):
        raise UserError(f"--processes (NUM_PROCESSES): found {number!r}, expected a whole number from 1 on")
    processes = int(number or max(1, num_gpus // getattr(config, "tensor_parallel", 1)))
    return processes, max(1, torch.get_num_threads() // processes)
