"""A process's place, its cores, and how many there are to be."""

import multiprocessing
import os
import socket
import subprocess
import sys
import time

import pytest

from llm2.common.distributed import DistInfo, barrier, destroy_group, dist_info, iter_shared_work, resolve_parallelism
from llm2.config import ExploreConfig


def config(**changes) -> ExploreConfig:
    return ExploreConfig(model="m", output="o", task="testbed", **{"device": "cpu", **changes})


def test_the_launchers_words_are_taken_and_without_them_one_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert dist_info() == DistInfo(0, 1, 0, 1) and dist_info().is_main
    barrier()  # returns at once: there is no other
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert dist_info() == DistInfo(5, 8, 1, 4) and not dist_info().is_main


def test_a_process_for_every_tensor_parallel_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.get_num_threads", lambda: 16)
    assert resolve_parallelism(config()) == (1, 16)
    assert resolve_parallelism(config(device="cuda")) == (8, 2)
    assert resolve_parallelism(config(device="cuda", engine="vllm", tensor_parallel=4)) == (2, 8)
    assert resolve_parallelism(config(device="cuda", tensor_parallel=3)) == (3, 5)
    assert resolve_parallelism(config(device="cuda", server="http://localhost/v1")) == (
        1,
        16,
    )  # the GPUs are the server's


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="two cores of Linux are wanted")
def test_processes_of_one_machine_share_its_cores_out():
    code = (
        "import os; from llm2.common.distributed import pin_to_cores as f; f(); print(sorted(os.sched_getaffinity(0)))"
    )
    found = []
    for rank in "01":
        environment = {**os.environ, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
        printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
        found.append(set(eval(printed)))
    assert found[0] and found[1] and not found[0] & found[1]


def test_alone_all_work_is_ones_own(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert list(iter_shared_work(5)) == [0, 1, 2, 3, 4] and list(iter_shared_work(0)) == []


def work(rank: int, world_size: int, port: int, results: multiprocessing.Queue) -> None:
    """The last process is slow."""
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in names.items()})
    for total in (30, 12):
        barrier()
        taken = []
        for number in iter_shared_work(total):
            taken.append(number)
            time.sleep(0.3 if rank == world_size - 1 else 0.01)
        results.put((total, rank, taken))
    barrier()
    destroy_group()


def test_work_is_done_once_and_a_slow_process_is_relieved_of_it():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork, world = multiprocessing.get_context("fork"), 3
    results = fork.Queue()
    processes = [fork.Process(target=work, args=(rank, world, port, results)) for rank in range(world)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in range(2 * world)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * world
    for total in (30, 12):
        assert sorted(sum((numbers for own, _, numbers in found if own == total), [])) == list(range(total))
    assert all(len(numbers) < total // 3 for total, rank, numbers in found if rank == 2)
