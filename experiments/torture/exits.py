"""Two processes that work for a second and end, over and over: each must end with status 0.

Once, and never again, such a process aborted when its interpreter shut down, its work done.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

from llm2.common.files import write_text
from tests.robustness.commands import last_words, settings, start
from tests.robustness.row import Row

RESUMES = True  # after the last start
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
    kept = folder / "statuses.json"
    statuses: list[int] = json.loads(kept.read_text()) if kept.exists() else []
    for number in range(len(statuses), max(2, round(STARTS * scale))):
        name = list(COMMANDS)[number % len(COMMANDS)]
        output, log = folder / str(number), folder / f"{number}.log"
        shutil.rmtree(output, ignore_errors=True)
        arguments = [name, *settings({**COMMON, **COMMANDS[name], "output_dir": output})]
        # Each abort of a worker ends the launcher with a status that is not 0.
        status = start(arguments, log, processes=2).wait(LONGEST)
        if not status:
            shutil.rmtree(output)
            log.unlink()
        write_text(kept, json.dumps(statuses := [*statuses, status]) + "\n")
    rows = []
    for index, name in enumerate(COMMANDS):
        counts = Counter(statuses[index :: len(COMMANDS)])
        detail = ", ".join(f"status {status}: {count}" for status, count in sorted(counts.items()))
        failed = [number for number in range(index, len(statuses), len(COMMANDS)) if statuses[number]]
        detail += "".join(f"; {number}.log: {last_words(folder / f'{number}.log')}" for number in failed[:1])
        rows.append(Row(f"exits of two processes: {name}", counts.total(), counts.total() - counts[0], detail))
    return rows
