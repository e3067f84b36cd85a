"""This process's place among those that `accelerate launch` started, on one machine or several.

Knows what the launcher says in the environment, which cores are this process's, and how the processes wait for each
other and share work out. They share files, nothing else: what one finds out, another reads from disk.
"""

import gc
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any, NamedTuple

import torch
from torch.distributed.rendezvous import rendezvous

WAIT = timedelta(days=30)  # for the slowest process; a dead one is noticed by the launcher, which ends the others
works = count()  # numbers what is shared out, alike in all processes


class DistInfo(NamedTuple):
    rank: int
    world_size: int  # processes on all machines
    local_rank: int  # on this machine: its GPU
    local_world_size: int  # processes on this machine

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def dist_info() -> DistInfo:
    """Alone where no launcher says otherwise."""
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    return DistInfo(*(int(os.environ.get(name, value)) for name, value in alone.items()))


def pin_to_cores() -> None:
    """Pin this process to its share of the machine's cores, where it has one: else they move about and wait."""
    here = dist_info()
    if sys.platform != "linux" or here.local_world_size == 1:
        return
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // here.local_world_size
    if share:
        os.sched_setaffinity(0, cores[here.local_rank * share : (here.local_rank + 1) * share])


def barrier() -> None:
    """Return when every process has come here. Gloo on every machine: waiting is no work for a GPU."""
    if dist_info().world_size == 1:
        return
    if not torch.distributed.is_initialized():
        here = dist_info()
        torch.distributed.init_process_group(
            "gloo", store=_store(), rank=here.rank, world_size=here.world_size, timeout=WAIT
        )
    torch.distributed.barrier()


def iter_shared_work(total: int) -> Iterator[int]:
    """The numbers below `total` that are this process's to work on; each is one process's alone.

    First its share, every so many-th; then, one at a time, what slower processes have not come to: none is idle while
    another still has work ahead of it. To be called by all processes.
    """
    here, work = dist_info(), next(works)
    if here.world_size == 1:
        yield from range(total)
        return
    for owner in ((here.rank + i) % here.world_size for i in range(here.world_size)):
        share = range(owner, total, here.world_size)
        while (taken := _store().add(f"work {work} share {owner}", 1)) <= len(share):
            yield share[taken - 1]


@cache
def _store() -> torch.distributed.Store:
    """What all processes read and write: keys and values, with the launcher or the first process."""
    store, _, _ = next(rendezvous("env://", timeout=WAIT))
    store.set_timeout(WAIT)
    return store


def destroy_group() -> None:
    """The last thing that a process does among others, so that no message is under way while Python shuts down.

    A thread that then lets go of a tensor aborts its process, whose work is done.
    """
    if torch.distributed.is_initialized():
        gc.collect()  # tensors in reference cycles
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        _store.cache_clear()


def resolve_parallelism(config: Any) -> tuple[int, int]:
    """Processes to start on this machine and threads of each, for the config of a command.

    NUM_PROCESSES says how many; else one for every GPU (every `tensor_parallel` GPUs), and one where there is no GPU or
    a server does the work.
    """
    gpus = torch.cuda.device_count()
    if getattr(config, "device", "auto") == "cpu" or getattr(config, "server", None) is not None:
        gpus = 0
    processes = int(os.environ.get("NUM_PROCESSES") or max(1, gpus // getattr(config, "tensor_parallel", 1)))
    return processes, max(1, torch.get_num_threads() // processes)
