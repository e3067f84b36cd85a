"""Rank, cores, shared work and the number of processes."""

import multiprocessing
import os
import socket
import sys
import time

import pytest

from llm2.__main__ import COMMANDS, main
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
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.get_num_threads", lambda: 16)
    assert resolve_parallelism(config()) == (1, 16)
    assert resolve_parallelism(config(device="cuda")) == (8, 2)
    assert resolve_parallelism(config(device="cuda", engine="vllm", tensor_parallel=4)) == (2, 8)
    assert resolve_parallelism(config(device="cuda", tensor_parallel=3)) == (2, 8)
    assert resolve_parallelism(config(device="cuda", server="http://localhost/v1")) == (1, 16)  # it has the GPUs
    assert resolve_parallelism(config(device="cuda"), "3") == resolve_parallelism(config(), "3") == (3, 5)
    assert resolve_parallelism(config(device="cuda"), "") == (8, 2)  # an empty variable in the environment


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


@pytest.mark.long
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
def test_a_number_of_processes_that_is_none_is_refused(number):
    with pytest.raises(UserError, match=rf"--processes \(NUM_PROCESSES\): found '{number}', expected a whole number"):
        resolve_parallelism(config(), number)


class Replaced(Exception):
    """In place of os.execv, which does not return."""


@pytest.fixture
def started(monkeypatch):
    """What main([...]) starts in its own place: a command line, or None if it runs the command itself."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")
    for name in (*launcher, "NUM_PROCESSES", "ACCELERATE_CONFIG", "ACCELERATE_ARGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # restored afterwards
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)

    def execv(path, command):
        assert path == command[0] == sys.executable
        raise Replaced(*command[1:])

    monkeypatch.setattr("os.execv", execv)
    for name, command in COMMANDS.items():
        monkeypatch.setitem(COMMANDS, name, command._replace(check=lambda config: None, run=lambda config: None))

    def main_of(*arguments):
        try:
            assert main([*arguments]) == 0
        except Replaced as replaced:
            return [*replaced.args]

    return main_of


TRAIN = ("train", "model=testbed", "train_file=dataset/testbed.jsonl", "device=cpu")


def test_processes_are_started_by_accelerate_with_the_arguments_of_the_command(started, tmp_path):
    train = (*TRAIN, f"output_dir={tmp_path}/v")
    assert started(*train) is None
    for arguments in (["--processes", "2"], ["--debug", "--processes", "2"]):
        command = started(*train, *arguments)
        assert command[:3] == ["-m", "accelerate.commands.launch", "--quiet"] and "--multi_gpu" in command
        assert command[command.index("--num_processes") :][:4] == [
            *("--num_processes", "2", "--num_cpu_threads_per_process", "2")
        ]
        assert command[-len(train) - len(arguments) :] == ["-m", "llm2", *train, *arguments[:-2]]


def test_the_environment_says_what_the_options_say(started, monkeypatch, tmp_path):
    train, file = (*TRAIN, f"output_dir={tmp_path}/v"), "configs/accelerate/zero3.yaml"
    options = {"processes": "2", "accelerate-config": file, "accelerate-args": "--num_machines 2 --machine_rank 1"}
    expected = started(*train, *(part for name, value in options.items() for part in (f"--{name}", value)))
    assert "--multi_gpu" not in expected and expected[expected.index("--config_file") + 1] == file
    assert expected[-len(train) - 6 : -len(train) - 2] == ["--num_machines", "2", "--machine_rank", "1"]
    for name, value in zip(("NUM_PROCESSES", "ACCELERATE_CONFIG", "ACCELERATE_ARGS"), options.values(), strict=True):
        monkeypatch.setenv(name, value)
    assert started(*train) == expected
    assert started(*train, "--processes", "1") != expected  # an option wins


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"])
def test_a_process_of_a_launcher_starts_no_other(started, monkeypatch, variable, tmp_path):
    monkeypatch.setenv("NUM_PROCESSES", "2")
    monkeypatch.setenv(variable, "0")
    assert started(*TRAIN, f"output_dir={tmp_path}/v") is None


def test_a_mistake_is_refused_before_processes_start(started, monkeypatch, capsys, tmp_path):
    def refuse(config):
        raise UserError("no")

    monkeypatch.setitem(COMMANDS, "train", COMMANDS["train"]._replace(check=refuse))
    train = [*TRAIN, f"output_dir={tmp_path}/v", "--processes"]
    assert main([*train, "2"]) == 2 and capsys.readouterr().err == "llm2 train: no\n"
    assert main([*train, "two"]) == 2 and "found 'two'" in capsys.readouterr().err
    assert main([*train, "2", "--accelerate-config", "nowhere.yaml"]) == 2
    assert "--accelerate-config: expected a file, found none at 'nowhere.yaml'" in capsys.readouterr().err


def test_one_process_that_trains_sees_one_gpu_unless_the_user_says_which(started, monkeypatch, tmp_path):
    evaluate = ("evaluate", "model=testbed", "task=testbed", "device=cpu", f"output_dir={tmp_path}/e")
    assert started(*evaluate) is None and "CUDA_VISIBLE_DEVICES" not in os.environ
    train = (*TRAIN, f"output_dir={tmp_path}/v")
    assert started(*train) is None and os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    assert started(*train) is None and os.environ["CUDA_VISIBLE_DEVICES"] == "1,2"
