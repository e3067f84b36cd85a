"""The product's own commands in processes of their own, as the scripts start them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
MULTI = "configs/accelerate/multi_gpu.yaml"  # what scripts/launch.sh takes for several processes
POLL = 0.05


def start(arguments: Sequence[str], log: Path, processes: int = 1, **environment: str) -> subprocess.Popen:
    """`python -m llm2` or, for several processes, `accelerate launch`; one thread each, output to a file."""
    command = [sys.executable, "-m", "llm2", *arguments]
    if processes > 1:
        launcher = ["-m", "accelerate.commands.launch", "--quiet", "--config_file", MULTI, "--num_processes"]
        launcher += [str(processes), "--num_cpu_threads_per_process", "1", "-m", "llm2"]
        command = [sys.executable, *launcher, *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **fixed, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it started; a launcher's workers have sessions, so process groups, of their own."""
    first = psutil.Process(pid)
    return [first, *first.children(recursive=True)]


def kill_once(process: subprocess.Popen, ripe: Callable[[], bool]) -> bool:
    """SIGKILL the process and those it started as soon as it is `ripe`; False where it ended before."""
    while process.poll() is None:
        if ripe():
            tree = family(process.pid)
            for each in reversed(tree):
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(tree)
            return True
        time.sleep(POLL)
    return False


def last_words(log: Path) -> str:
    return log.read_text(errors="replace")[-400:]


def settings(values: Mapping[str, object]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]
