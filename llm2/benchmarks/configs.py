"""The keys of the benchmarks: one frozen dataclass each; the key `benchmark` of a file says which."""

from collections.abc import Sequence
from typing import Literal

from pydantic.dataclasses import dataclass

from llm2.common.config_file import read_file
from llm2.config import (
    STRICT,
    Count,
    Device,
    Dtype,
    GuidanceConfig,
    LlamaShape,
    ModelConfig,
    NonNegative,
    RolloutConfig,
    Share,
)
from llm2.errors import UserError


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DecodeBenchmark(LlamaShape, GuidanceConfig):
    """Guided decoding against transformers' `generate`."""

    benchmark: Literal["decode"]
    output: str = "results/benchmark/decode.json"
    batch_sizes: tuple[Count, ...] = (1, 32)
    """Sequences of a call."""
    prompt_tokens: Count = 64
    new_tokens: Count = 128
    choice_share: Share = 0.2
    """System 1's logits are scaled until this share of the steps has more than one candidate."""
    lora_r: Count = 8
    """Rank of the shared LoRA verifier."""
    rounds: Count = 5
    """Alternating runs of each row."""
    seed: int = 0
    device: Device = "auto"
    dtype: Dtype = "auto"


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ThroughputBenchmark(ModelConfig, GuidanceConfig):
    """Problems a second with trained systems, against `generate` at several batch sizes."""

    benchmark: Literal["throughput"]
    verifier: str
    """Folder of a trained verifier."""
    output: str = "results/benchmark/throughput.json"
    model: str = "testbed"
    problems: Count = 512
    """Of the testbed's test split."""
    problems_one_by_one: Count = 64
    """Of these, for `generate` at batch size 1."""
    generate_batch_sizes: tuple[Count, ...] = (1, 16, 64, 128, 256)
    """1 among them."""
    batch_size: Count = 256
    """Rows in flight of ours."""
    beta: NonNegative = 0.5
    max_new_tokens: Count = 200
    rounds: Count = 5
    """Alternating runs of each row."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TrainBenchmark(LlamaShape):
    """A training step against the plain way and the bare backbone; reading data."""

    benchmark: Literal["train"]
    output: str = "results/benchmark/train.json"
    solutions: tuple[Count, ...] = (1, 8)
    """Of a step; the plain way runs at the first of these alone."""
    tokens: Count = 200
    """A solution."""
    pairs: Count = 20
    """A solution, evenly spread over its tokens."""
    lines: Count = 10_000
    """Of the file that is checked and tokenized."""
    rounds: Count = 5
    """Alternating runs of each row."""
    seed: int = 0
    device: Device = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class RolloutBenchmark(RolloutConfig):
    """Exploration's rollouts against transformers' `generate`."""

    benchmark: Literal["rollouts"]
    output: str = "results/benchmark/rollouts.json"
    model: str = "testbed"
    task: str = "testbed"
    split: str = "train"
    problems: Count = 8
    """Whose forks' tokens are the prefixes."""
    rollouts: Count = 8
    """Continuations of each prefix."""
    vllm: bool = False
    """Measure vLLM too, where it is installed; wants top_k."""
    max_new_tokens: Count = 200
    batch_size: Count = 64
    """Rows in flight, of both."""
    rounds: Count = 5
    """Alternating runs of each row."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class LabelsBenchmark:
    """The sequential test's labels against an exhaustive reference."""

    benchmark: Literal["labels"]
    output: str = "results/benchmark/labels.json"
    explore: str = "configs/testbed/explore.yaml"
    """What is held against the reference."""
    problems: Count = 200
    """The first so many."""
    reference_rollouts: Count = 64
    """Of every plausible token."""
    reference_seed: int = 1
    fixed_rollouts: Count = 16
    """A token, of the exploration whose cost is compared with."""


BENCHMARKS = {
    "decode": DecodeBenchmark,
    "throughput": ThroughputBenchmark,
    "train": TrainBenchmark,
    "rollouts": RolloutBenchmark,
    "labels": LabelsBenchmark,
}


def benchmark_class(path: str | None, overrides: Sequence[str] = ()) -> type:
    """Which benchmark a file and overrides are for, by the key `benchmark`."""
    values, origin = ({}, {}) if path is None else read_file(path)
    values |= dict(override.split("=", 1) for override in overrides if override.startswith("benchmark="))
    found = values.get("benchmark")
    if found not in BENCHMARKS:
        where = origin.get("benchmark", path or "no config file")
        raise UserError(f"{where}: key 'benchmark': found {found!r}, expected: one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[found]
