"""Two processes that work for a second and end, over and over: each must end with status 0.

Once, and never again, such a process aborted when its interpreter shut down, its work done.
"""

import shutil
from collections import Counter
from pathlib import Path

from tests.torture.commands import last_words, settings, start
from tests.torture.row import Row

STARTS = 200
LONGEST = 300  # seconds
COMMON = {"model": "testbed", "device": "cpu", "limit": 24}
COMMANDS = {
    "evaluate": {"task": "testbed", "modes": "[plain_greedy]", "max_new_tokens": 60},
    "train": {
        "train_file": "dataset/testbed.jsonl",
        "num_train_epochs": 1.0,
        "global_batch_size": 8,
        "per_device_train_batch_size": 4,
        "eval_share": 0.2,
        "evaluations": 1,
    },
}


def run(folder: Path, scale: float) -> list[Row]:
    """Both commands in turn: one shares work through the store alone, the other reduces gradients over gloo."""
    statuses: dict[str, Counter[int]] = {name: Counter() for name in COMMANDS}
    words = ""
    for number in range(max(2, round(STARTS * scale))):
        name = list(COMMANDS)[number % len(COMMANDS)]
        output, log = folder / str(number), folder / f"{number}.log"
        arguments = [name, *settings({**COMMON, **COMMANDS[name], "output_dir": output})]
        # Each abort of a worker ends the launcher with a status that is not 0.
        status = start(arguments, log, processes=2).wait(LONGEST)
        statuses[name][status] += 1
        if status:
            words = f"; {log}: {last_words(log)}"
        else:
            shutil.rmtree(output)
            log.unlink()
    return [
        Row(
            f"exits of two processes: {name}",
            counts.total(),
            counts.total() - counts[0],
            ", ".join(f"status {status}: {count}" for status, count in sorted(counts.items())) + words,
        )
        for name, counts in statuses.items()
    ]
