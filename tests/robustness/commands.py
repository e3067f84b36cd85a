"""The product's own commands in processes of their own, as the scripts start them."""

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import psutil

from experiments.commands import MODULES

ROOT = Path(__file__).parents[2]
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, PR_CAPBSET_DROP = 1, 2, 24
POLL = 0.05


def start(
    arguments: Sequence[str],
    log: Path | None,
    processes: int = 1,
    folder: Path = ROOT,
    before: Callable[[], None] | None = None,
    **more: str,
) -> subprocess.Popen:
    """The command's module; several processes are for commands of llm2 alone.

    Args:
        log: the file to which the output is added; None for a pipe.
        folder: the working directory.
        before: what the process does before the command begins.
        more: as for `environment`.
    """
    several = ["--processes", str(processes)] if processes > 1 else []
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") if log is not None else nullcontext(subprocess.PIPE) as output:
        return subprocess.Popen(
            [sys.executable, "-m", module_of(arguments[0]), *arguments, *several],
            cwd=folder,
            env=environment(**more),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=before,
        )


def module_of(command: str) -> str:
    """What `python -m` runs for a command: llm2 or experiments."""
    return "experiments" if command == "study" else MODULES.get(command, "llm2")


def environment(**more: str) -> dict[str, str]:
    """This process's, for commands in any folder: one thread each, no network, no GPU."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    fixed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed, "DS_ACCELERATOR": "cpu", **more}


def keep_to_permissions() -> None:
    """For root, from the next exec on: a file's permissions hold for it as for anyone."""
    if os.geteuid() == 0:
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


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
