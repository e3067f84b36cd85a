"""Rollouts of this version against those of an earlier commit, in turn in one run.

    PYTHONPATH=. python experiments/results/against_commit.py COMMIT [threads=2] [rounds=3] [dtype=bfloat16]

SmolLM2-135M-Instruct behind SVAMP's problems, temperature 1, 80 new tokens each. Tokens/s over the commit's: median and
range over rounds.
"""

import json
import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path

from benchmarks.runner import ratios, spread
from llm2.common.chat import encode_chats
from llm2.common.loading import load_tokenizer, model_path
from llm2.tasks import load_task

NEW = 80
CASES = {  # prompts, samples of each
    "64 separate prompts": (64, 1),
    "64 rows of 4 prompts": (4, 16),
    "256 separate prompts": (256, 1),
    "256 rows of 16 prompts": (16, 16),
}
DECODES = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
from llm2.decoding.decoder import Decoder
from llm2.decoding.sampling import SamplingParams
folder, threads, dtype, new, prompts = json.loads(sys.stdin.readline())
torch.set_num_threads(threads)
decoder = Decoder(AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval())
for line in sys.stdin:
    size, samples, seed = json.loads(line)
    options = {"sampling": SamplingParams(), "max_new_tokens": new, "eos": [], "batch_size": size * samples}
    options["seeds"] = [[seed + index * samples + sample for sample in range(samples)] for index in range(size)]
    start = time.perf_counter()
    decoder.decode(prompts[:size], **options)
    print(new * size * samples / (time.perf_counter() - start), flush=True)
"""


class Version:
    """A process that decodes with the code of a folder."""

    def __init__(self, folder: str, settings: list) -> None:
        command = [sys.executable, "-c", DECODES]
        self.process = subprocess.Popen(command, cwd=folder, stdin=-1, stdout=-1, text=True)
        self._send(settings)

    def rate(self, *case: int) -> float:
        """Tokens/s."""
        self._send(case)
        return float(self.process.stdout.readline())

    def _send(self, values: object) -> None:
        print(json.dumps(values), file=self.process.stdin, flush=True)


def main() -> None:
    commit, threads, rounds, dtype = [*sys.argv[1:], *("2", "3", "bfloat16")[len(sys.argv) - 2 :]]
    task, tokenizer = load_task("svamp"), load_tokenizer("smollm2")
    chats = [task.prompt(problem) for problem in task.problems("test", 256)]
    settings = [
        str(model_path("smollm2")),
        int(threads),
        dtype,
        NEW,
        encode_chats(tokenizer, chats, generation_prompt=True),
    ]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", folder, commit], check=True)
        try:
            versions, seeds = [Version(folder, settings), Version(str(Path.cwd()), settings)], count(step=1000)
            for name, case in CASES.items():
                rates = [[version.rate(*case, next(seeds)) for version in versions] for _ in range(int(rounds) + 1)]
                old, new = zip(*rates[1:], strict=True)  # the first round warms up
                found = spread(ratios(new, old))
                print(f"{name}: {found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], check=True)


if __name__ == "__main__":
    main()
