"""The configs of the benchmarks, a frozen dataclass each; the key `benchmark` of a file says which one it is for."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from llm2.common.config_file import read_file
from llm2.common.keys import Mark
from llm2.config import (
    STRICT,
    Count,
    DecodingConfig,
    Device,
    Dtype,
    GuidanceConfig,
    ModelConfig,
    NonNegative,
    OptionalFile,
    OptionalModel,
    Output,
    RolloutConfig,
    Share,
)
from llm2.errors import UserError


@dataclass(frozen=True, config=STRICT, kw_only=True)
class LlamaShape:
    """Shape of a Llama with random weights."""

    hidden_size: Count = 256
    """Width of the hidden states."""
    intermediate_size: Count = 688
    """Width of the feed-forward layers."""
    num_hidden_layers: Count = 6
    """Number of transformer layers."""
    num_attention_heads: Count = 8
    """Number of query heads per layer."""
    num_key_value_heads: Count = 4
    """Number of key-value heads per layer; fewer than the query heads is grouped-query attention."""
    vocab_size: Count = 8_192
    """Number of tokens in the vocabulary."""

    def shape(self) -> dict[str, int]:
        """These keys and values, as `LlamaConfig` takes them."""
        return {name: getattr(self, name) for name in LlamaShape.__dataclass_fields__}


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DecodeBenchmark(LlamaShape, GuidanceConfig):
    """Guided decoding against transformers' `generate`."""

    benchmark: Literal["decode"]
    """Which benchmark to run."""
    model: OptionalModel = None
    """System 1, as in other configs, and the verifier's weights; null for random ones in the shape given here."""
    output: str = "results/benchmark/decode.json"
    """JSON file for the results."""
    batch_sizes: tuple[Count, ...] = (1, 32, 64)
    """Batch sizes to measure: sequences per call."""
    prompt_tokens: Count = 64
    """Tokens per prompt."""
    new_tokens: Count = 128
    """New tokens per sequence."""
    choice_share: Share = 0.2
    """Share of the steps with more than one candidate; System 1's logits are scaled to reach it."""
    lora_r: Count = 8
    """LoRA rank of the verifier that shares System 1's weights."""
    graphs: bool = True
    """Measure with CUDA graphs too: speed on a GPU; host reads, padding and replays anywhere."""
    float16_weights: bool = False
    """Measure with float16 copies of the weights too, on an x86 CPU in float32."""
    rounds: Count = 5
    """Measured runs of each case."""
    seed: int = 0
    """Seed of the weights and the prompts."""
    device: Device = "auto"
    """Device of the models; auto is the GPU if there is one."""
    dtype: Dtype = "auto"
    """Dtype of the weights; auto is bfloat16 on a GPU and float32 on a CPU."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ThroughputBenchmark(ModelConfig, GuidanceConfig):
    """Problems per second with trained systems, against `generate` at several batch sizes."""

    benchmark: Literal["throughput"]
    """Which benchmark to run."""
    verifier: str
    """Trained verifier, a local folder or a hub id."""
    output: str = "results/benchmark/throughput.json"
    """JSON file for the results."""
    model: str = "testbed"
    """System 1: a local folder, a hub id, or `testbed` for the embedded one."""
    problems: Count = 512
    """Number of problems, the first ones of the testbed's test split."""
    problems_one_by_one: Count = 64
    """Number of problems for `generate` at batch size 1, the first ones: it is slow."""
    generate_batch_sizes: tuple[Count, ...] = (1, 16, 64, 128, 256)
    """Batch sizes for `generate`; must include 1."""
    batch_size: Count = 256
    """Sequences that LLM2's decoder processes at the same time."""
    beta: NonNegative = 0.5
    """Weight of the verifier's score in the guided logits."""
    max_new_tokens: Count = 200
    """Limit of new tokens per solution."""
    rounds: Count = 5
    """Measured runs of each case."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TrainBenchmark(LlamaShape):
    """Speed and memory of a training step, against plain sequences and the bare backbone; speed of reading data."""

    benchmark: Literal["train"]
    """Which benchmark to run."""
    output: str = "results/benchmark/train.json"
    """JSON file for the results."""
    solutions: tuple[Count, ...] = (1, 8)
    """Numbers of solutions per step to measure; the plain step runs with the first of them only."""
    tokens: Count = 200
    """Tokens per solution."""
    pairs: Count = 20
    """Pairs per solution, evenly spread over its tokens."""
    lines: Count = 10_000
    """Lines of the triplets file that is checked and tokenized."""
    rounds: Count = 5
    """Measured runs of each case."""
    seed: int = 0
    """Seed of the weights and the solutions."""
    device: Device = "auto"
    """Device of the models; auto is the GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class RolloutBenchmark(RolloutConfig):
    """Exploration's rollouts against transformers' `generate`, from the same prefixes."""

    benchmark: Literal["rollouts"]
    """Which benchmark to run."""
    output: str = "results/benchmark/rollouts.json"
    """JSON file for the results."""
    model: str = "testbed"
    """System 1: a local folder, a hub id, or `testbed` for the embedded one."""
    task: str = "testbed"
    """Task whose gold solutions give the prefixes: gsm8k, math500, testbed, or MODULE:CLASS."""
    split: str = "train"
    """Split of the task."""
    problems: Count = 8
    """Number of problems, the first ones; every plausible token at their forks gives a prefix."""
    rollouts: Count = 8
    """Rollouts of each prefix."""
    vllm: bool = False
    """Measure vLLM too; it must be installed, and needs top_k."""
    max_new_tokens: Count = 200
    """Limit of new tokens per rollout."""
    batch_size: Count = 64
    """Rollouts generated at the same time, by `generate` as well."""
    rounds: Count = 5
    """Measured runs of each case."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class LabelsBenchmark:
    """Exploration's labels and their cost against an exhaustive reference."""

    benchmark: Literal["labels"]
    """Which benchmark to run."""
    output: Output = "results/benchmark/labels.json"
    """JSON file for the results; the exploration and the reference are kept in a folder beside it."""
    explore: OptionalFile = None
    """Config of the exploration whose labels are compared with the reference; null for the testbed's with defaults."""
    problems: Annotated[Count, Mark.WHICH] = 200
    """Number of problems, the first ones of the exploration's."""
    reference_rollouts: Count = 64
    """Rollouts of every plausible token for the reference."""
    reference_seed: int = 1
    """Seed of the reference's rollouts; should differ from the exploration's."""
    decided_only: bool = False
    """Leave the tokens that exploration did not decide out of the reference, and the rows that need them."""
    fixed_rollouts: Annotated[Count, Mark.WHICH] = 16
    """The cost is stated relative to an exploration with this many rollouts of every plausible token."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ServedBenchmark(ModelConfig, DecodingConfig):
    """Guided and plain decoding by vLLM and by our decoder."""

    benchmark: Literal["served"]
    """Which benchmark to run."""
    verifier: str
    """Trained verifier, a local folder or a hub id."""
    output: str = "results/benchmark/served.json"
    """JSON file for the results."""
    model: str = "testbed"
    """System 1: a local folder, a hub id, or `testbed` for the embedded one."""
    task: str = "testbed"
    """Task whose problems are solved: gsm8k, math500, testbed, or MODULE:CLASS."""
    split: str = "test"
    """Split of the task."""
    problems: Count = 300
    """Number of problems of each round; every round has its own."""
    batch_sizes: tuple[Count, ...] = (64, 256)
    """Sequences decoded at the same time."""
    max_new_tokens: Count = 200
    """Limit of new tokens per solution."""
    rounds: Count = 5
    """Measured runs of each case."""


BENCHMARKS = {
    "decode": DecodeBenchmark,
    "throughput": ThroughputBenchmark,
    "train": TrainBenchmark,
    "rollouts": RolloutBenchmark,
    "labels": LabelsBenchmark,
    "served": ServedBenchmark,
}


def benchmark_class(path: str | None, overrides: Sequence[str] = ()) -> type:
    """The config class that the key `benchmark` of a file, or of the overrides, names. Raises UserError."""
    values, origin = ({}, {}) if path is None else read_file(path)
    values |= dict(override.split("=", 1) for override in overrides if override.startswith("benchmark="))
    name = values.get("benchmark")
    if name not in BENCHMARKS:
        where = origin.get("benchmark", path or "no config file")
        raise UserError(f"{where}: key 'benchmark': found {name!r}, expected: one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
