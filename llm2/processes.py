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
from typing import NamedTuple

import torch
from torch.distributed.rendezvous import rendezvous

from llm2.config import ExploreConfig

WAIT = timedelta(days=30)  # for the slowest process; a dead one is noticed by the launcher, which ends the others
works = count()  # numbers what is shared out, alike in all processes


class Place(NamedTuple):
    rank: int
    world: int  # processes on all machines
    local_rank: int  # on this machine: its GPU
    local_world: int  # processes on this machine

    @property
    def first(self) -> bool:
        return self.rank == 0


def place() -> Place:
    """Alone where no launcher says otherwise."""
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    return Place(*(int(os.environ.get(name, value)) for name, value in alone.items()))


def keep_to_own_cores() -> None:
    """Pin this process to its share of the machine's cores, where it has one: else they move about and wait."""
    here = place()
    if sys.platform != "linux" or here.local_world == 1:
        return
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // here.local_world
    if share:
        os.sched_setaffinity(0, cores[here.local_rank * share : (here.local_rank + 1) * share])


def wait_for_all() -> None:
    """Return when every process has come here. Gloo on every machine: waiting is no work for a GPU."""
    if place().world == 1:
        return
    if not torch.distributed.is_initialized():
        here = place()
        torch.distributed.init_process_group(
            "gloo", store=_store(), rank=here.rank, world_size=here.world, timeout=WAIT
        )
    torch.distributed.barrier()


def claimed(total: int) -> Iterator[int]:
    """The numbers below `total` that are this process's to work on; each is one process's alone.

    First its share, every so many-th; then, one at a time, what slower processes have not come to: none is idle while
    another still has work ahead of it. To be called by all processes.
    """
    here, work = place(), next(works)
    if here.world == 1:
        yield from range(total)
        return
    for owner in ((here.rank + i) % here.world for i in range(here.world)):
        share = range(owner, total, here.world)
        while (taken := _store().add(f"work {work} share {owner}", 1)) <= len(share):
            yield share[taken - 1]


@cache
def _store() -> torch.distributed.Store:
    """What all processes read and write: keys and values, with the launcher or the first process."""
    store, _, _ = next(rendezvous("env://", timeout=WAIT))
    store.set_timeout(WAIT)
    return store


def leave_group() -> None:
    """The last thing that a process does among others, so that no message is under way while Python shuts down.

    A thread that then lets go of a tensor aborts its process, whose work is done.
    """
    if torch.distributed.is_initialized():
        gc.collect()  # tensors in reference cycles
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        _store.cache_clear()


def plan(config: ExploreConfig) -> tuple[int, int]:
    """Processes to start, and threads of each on this machine."""
    gpus = 0 if config.device == "cpu" or config.server is not None else torch.cuda.device_count()
    processes = config.data_parallel or max(1, gpus // config.tensor_parallel)
    return processes, max(1, torch.get_num_threads() // processes)
