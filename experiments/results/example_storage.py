"""What keeping tokenized examples and frozen states costs: our files (llm2/verifier) beside `datasets`.

python experiments/results/example_storage.py examples|states files|datasets [SOLUTIONS]

200,000 solutions of 120 to 279 tokens with 8 triplets each; or 5,000 solutions with 8 states of width 576, as many
bytes a solution as SmolLM2-135M-Instruct's. Each case runs in a process of its own, for its peak of memory.
"""

import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator

import datasets
import numpy as np
import torch

from llm2.verifier.frozen_states import FrozenStates
from llm2.verifier.triplets import ExampleFile, Triplet

PAIRS, WIDTH, READS = 8, 576, 20_000
INT, FLOAT = datasets.Value("int32"), datasets.Value("float32")
FEATURES = {"ids": datasets.List(INT), "triplets": datasets.List(datasets.List(INT)), "start": INT, "line": INT}
FEATURES |= {"first_pair_id": datasets.Value("int64"), "gaps": datasets.List(FLOAT), "better": datasets.List(FLOAT)}


def solutions(count: int) -> Iterator[tuple[list[int], list[Triplet]]]:
    for i in range(count):
        ids = list(range(i % 1_000, i % 1_000 + 120 + i % 160))
        yield ids, [Triplet(60 + 4 * j, ids[60 + 4 * j], 7) for j in range(PAIRS)]


def example_rows(count: int) -> Iterator[dict]:
    for line, (ids, triplets) in enumerate(solutions(count)):
        numbers = {"start": 50, "line": line, "first_pair_id": PAIRS * line}
        yield {"ids": ids, "triplets": [[*t] for t in triplets], "gaps": [0.5] * 8, "better": [0.9] * 8, **numbers}


def example_file(count: int) -> ExampleFile:
    examples = ExampleFile()
    for line, (ids, triplets) in enumerate(solutions(count)):
        examples.append(ids, triplets, 50, [0.5] * PAIRS, [0.9] * PAIRS, line)
    return examples


class NoModel:
    """Stands for a verifier whose states cost nothing."""

    device = torch.device("cpu")

    def eval(self) -> None:
        pass

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return torch.nn.Embedding(1, WIDTH)

    def states(self, ids: torch.Tensor, *unused: torch.Tensor) -> torch.Tensor:
        return torch.ones(*ids.shape, WIDTH)


def state_rows(count: int) -> Iterator[dict]:
    for _ in range(count):
        yield {"states": np.ones((PAIRS, WIDTH), dtype=np.float32)}


def main(what: str, how: str, count: int) -> None:
    before, began, cpu = peak(), time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        if how == "files":
            kept = example_file(count)
            if what == "states":
                kept = FrozenStates(NoModel(), kept, batch_size=16)
        else:
            features = FEATURES if what == "examples" else {"states": datasets.Array2D((PAIRS, WIDTH), "float32")}
            rows = example_rows if what == "examples" else state_rows
            make = datasets.Dataset.from_generator
            kept = make(rows, datasets.Features(features), cache_dir=folder, gen_kwargs={"count": count})
            kept = kept if what == "examples" else kept.with_format("torch")
        wall, cpu, generator = time.perf_counter() - began, time.process_time() - cpu, random.Random(0)
        began = time.process_time()
        for _ in range(READS):
            kept[generator.randrange(count)]
        read = (time.process_time() - began) / READS * 1e6
        print(f"{what} {how}: written in {cpu:.1f} s of CPU ({wall:.1f} s), {read:.0f} us a read, ", end="")
        print(f"peak {peak() - before:.0f} MiB more")


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(
        sys.argv[1],
        sys.argv[2],
        int(sys.argv[3]) if len(sys.argv) > 3 else {"examples": 200_000, "states": 5_000}[sys.argv[1]],
    )
