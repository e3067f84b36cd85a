"""Several processes of one machine, forked: torch is already imported, and a launcher would import it again in each."""

import multiprocessing
import os
import socket
import warnings
from collections.abc import Callable
from typing import Any

from accelerate.state import AcceleratorState


def run_ranks(function: Callable, *arguments: Any, world: int = 2) -> list[int]:
    """The exit codes of `world` processes that call function(*arguments) as a launcher's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_rank, args=(rank, world, port, function, arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    return [process.exitcode for process in processes]


def _rank(rank: int, world: int, port: int, function: Callable, arguments: tuple) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer of the test's own process has set it
    warnings.simplefilter("default")  # a launched process does not inherit pytest's either
    function(*arguments)
