"""Rank, cores, shared work and the number of processes."""

import multiprocessing
import os
import socket
import sys
import time

import pytest

from llm2.common.distributed import (
    DistInfo,
    barrier,
    destroy_group,
    dist_info,
    iter_shared_work,
    pin_to_cores,
    resolve_parallelism,
)
from llm2.config import ExploreConfig
from llm2.errors import UserError

FORK = multiprocessing.get_context("fork")


def run_all(processes: list[multiprocessing.Process]) -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def config(**changes) -> ExploreConfig:
    return ExploreConfig(model="m", output="o", task="testbed", **{"device": "cpu", **changes})


def test_dist_info_reads_the_environment_and_defaults_to_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert dist_info() == DistInfo(0, 1, 0, 1) and dist_info().is_main
    barrier()  # returns at once
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert dist_info() == DistInfo(5, 8, 1, 4) and not dist_info().is_main


def test_one_process_for_every_tensor_parallel_gpus(monkeypatch):
    monkeypatch.delenv("NUM_PROCESSES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.get_num_threads", lambda: 16)
    assert resolve_parallelism(config()) == (1, 16)
    assert resolve_parallelism(config(device="cuda")) == (8, 2)
    assert resolve_parallelism(config(device="cuda", engine="vllm", tensor_parallel=4)) == (2, 8)
    assert resolve_parallelism(config(device="cuda", tensor_parallel=3)) == (2, 8)
    assert resolve_parallelism(config(device="cuda", server="http://localhost/v1")) == (1, 16)  # it has the GPUs
    monkeypatch.setenv("NUM_PROCESSES", "3")
    assert resolve_parallelism(config(device="cuda")) == resolve_parallelism(config()) == (3, 5)


def pinned(rank: int, results: multiprocessing.Queue) -> None:
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    pin_to_cores()
    results.put(os.sched_getaffinity(0))


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two cores")
def test_processes_of_one_machine_get_disjoint_cores():
    results = FORK.Queue()
    run_all([FORK.Process(target=pinned, args=(rank, results)) for rank in range(2)])
    one, other = results.get(timeout=60), results.get(timeout=60)
    assert one and other and not one & other


def test_a_single_process_does_all_work(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert list(iter_shared_work(5)) == [0, 1, 2, 3, 4] and list(iter_shared_work(0)) == []


def work(rank: int, world_size: int, port: int, results: multiprocessing.Queue) -> None:
    """The last process is slow."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for total in (30, 12):
        barrier()
        taken = []
        for number in iter_shared_work(total):
            taken.append(number)
            time.sleep(0.2 if rank == world_size - 1 else 0.005)
        results.put((total, rank, taken))
    barrier()
    destroy_group()


def test_every_item_is_done_once_and_slow_processes_do_fewer():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results, world_size = FORK.Queue(), 3
    run_all([FORK.Process(target=work, args=(rank, world_size, port, results)) for rank in range(world_size)])
    shares = [results.get(timeout=60) for _ in range(2 * world_size)]
    for total in (30, 12):
        assert sorted(sum((items for of, _, items in shares if of == total), [])) == list(range(total))
    assert all(len(items) < total // 3 for total, rank, items in shares if rank == 2)


@pytest.mark.parametrize("number", ["two", "0", "-1", "1.5"])
def test_a_number_of_processes_that_is_none_is_refused(monkeypatch, number):
    monkeypatch.setenv("NUM_PROCESSES", number)
    with pytest.raises(UserError, match=f"NUM_PROCESSES: found '{number}', expected a whole number"):
        resolve_parallelism(config())
