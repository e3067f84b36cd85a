"""This process's place among those that `accelerate launch` started, on one machine or several.

Knows what the launcher says in the environment, which cores are this process's, and how the processes wait for each
other. They share files, nothing else: what one finds out, another reads from disk.
"""

import gc
import os
import sys
from datetime import timedelta
from typing import NamedTuple

import torch

from llm2.config import ExploreConfig

WAIT = timedelta(days=30)  # for the slowest process; a dead one is noticed by the launcher, which ends the others


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
        torch.distributed.init_process_group("gloo", timeout=WAIT)
    torch.distributed.barrier()


def leave_group() -> None:
    """The last thing that a process does among others, so that no message is under way while Python shuts down.

    A thread that then lets go of a tensor aborts its process, whose work is done.
    """
    if torch.distributed.is_initialized():
        gc.collect()  # tensors in reference cycles
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def plan(config: ExploreConfig) -> tuple[int, int]:
    """Processes to start, and threads of each on this machine."""
    gpus = 0 if config.device == "cpu" or config.server is not None else torch.cuda.device_count()
    processes = config.data_parallel or max(1, gpus // config.tensor_parallel)
    return processes, max(1, torch.get_num_threads() // processes)
