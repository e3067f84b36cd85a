"""One frozen dataclass a command; its YAML file mirrors it one to one.

Knows the fields, their types, bounds and defaults, and how to say what is wrong with a file or an override. Knows
nothing of what the commands do with them.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from llm2.errors import UserError

STRICT = ConfigDict(extra="forbid", strict=True)
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Config = TypeVar("Config")
Mode = Literal["plain_greedy", "guided_greedy", "plain_sampling", "guided_sampling"]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class PretrainConfig:
    """Train the testbed's System 1 from scratch: `python -m llm2 pretrain`."""

    output_dir: str  # folder for the model, its tokenizer and its card
    hidden_size: Count = 160
    intermediate_size: Count = 432
    layers: Count = 4
    heads: Count = 5
    key_value_heads: Count = 5
    vocab_size: Count = 640  # byte-level BPE, digits one by one
    documents: Count = 115_200  # solved problems in the careless corpus
    steps: Count = 3_600
    batch_size: Count = 32  # documents a step
    learning_rate: Positive = 2e-3
    warmup: Share = 0.05  # share of the steps
    save_steps: Count = 250  # a checkpoint to resume from, every so many steps
    card_problems: Count = 500  # validation problems that the card's figures rest on
    seed: int = 0


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ExploreConfig:
    """Token quality exploration: gold solutions in, triplets out: `python -m llm2 explore`."""

    model: str  # System 1: a local folder or a hub id
    output: str  # the triplets, JSON lines; OUTPUT.pairs.jsonl holds every verdict, OUTPUT.report.json the counts
    benchmark: Literal["testbed", "gsm8k", "chats"]  # chats: any JSON lines of `messages`, from data_file
    data_file: str | None = (
        None  # local JSON lines in place of the benchmark's own source: `question` and `answer`, ...
    )
    # ... or, with benchmark chats, `messages` that end in the gold solution, and `answer` where the checker wants one
    checker: str = "number"  # is an answer right? number (llm2/grading.py), or MODULE:FUNCTION of (text, gold) -> bool
    split: str = "train"
    limit: Count | None = None  # the first so many problems; all when null
    chat_template: str | None = None  # name or file (llm2/chat.py); the tokenizer's own when null
    alpha: Share = 0.1  # a token is plausible from alpha times the top probability
    top_k: Count | None = None  # at most so many plausible tokens a position
    margin: Share = 0.35  # a negative's quality is below gold's by more than this ...
    confidence: Share = 0.85  # ... with at least this posterior probability (the test: llm2/quality.py)
    futility: Share = 0.03  # a token is as good as gold once that probability is at most this
    rollouts_gold: Count = 10  # rollouts of the gold token of a fork, those counted that pass through it
    rollouts_first: Count = 2  # rollouts of another token before it can be a negative
    rollouts_step: Count = 1  # rollouts added where still undecided
    rollouts_cap: Count = 8  # rollouts at which an undecided token is given up
    max_triplets: Count | None = None  # a solution keeps at most so many, the most informative ones; all when null
    temperature: NonNegative = 1.0  # of the rollouts; 0 is greedy
    top_p: Share = 1.0
    max_new_tokens: Count = 512  # per rollout
    stop_pattern: str | None = (
        None  # a regular expression that ends a rollout whose answer is decided; engine llm2 only
    )
    engine: Literal["llm2", "vllm"] = "llm2"  # what writes the rollouts; vllm is an extra that is installed separately
    tensor_parallel: Count = 1  # GPUs of one vLLM engine
    data_parallel: Count | None = (
        None  # processes that scripts/explore_tokens.sh starts, each with an engine and its ...
    )
    # ... share of the problems; when null one for every tensor_parallel GPUs, and one on a CPU
    server: str | None = None  # with engine vllm: a vLLM server's URL (http://HOST:8000/v1) in place of one in process
    server_requests: Count = 64  # requests in flight at that server
    batch_size: Count = 64  # rollouts in flight
    seed: int = 0
    device: Device = "auto"
    dtype: Dtype = "auto"


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TrainConfig:
    """Train the verifier on triplets: `python -m llm2 train`."""

    model: str  # System 1, from which the verifier's backbone is initialised: a local folder or a hub id
    train_file: str  # triplets, JSON lines
    output_dir: str  # the verifier and its checkpoints
    eval_file: str | None = None  # held-out triplets; when null a share of train_file is held out
    eval_share: Share = 0.05  # share of the solutions held out when there is no eval_file
    chat_template: str | None = None  # name or file (llm2/chat.py); the tokenizer's own when null
    max_length: Count = 2048  # pairs at or beyond this position are dropped, and counted
    lora_rank: Count | None = None  # train adapters of this rank on System 1's frozen weights; all weights when null
    lora_alpha: Positive = 32.0  # the adapters' sum is scaled by lora_alpha / lora_rank
    lora_dropout: Share = 0.0
    lora_targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"  # names of the adapted layers
    quality_weight: bool = False  # weight a pair by gold's quality less the negative's (key `quality` of the file)
    margin: NonNegative = 0.0  # by how much gold's score is to exceed the negative's before a pair counts as even
    language_weight: NonNegative = 0.0  # of an auxiliary loss: mean -log p of the solutions' tokens
    epochs: Positive = 2.0
    learning_rate: Positive = 2e-5
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt"] = "cosine"
    warmup: Share = 0.1  # share of the steps
    weight_decay: NonNegative = 0.0
    max_grad_norm: NonNegative = 1.0
    global_batch_size: Count = 128  # solutions an optimizer step, over all ranks and accumulation
    per_device_batch_size: Count = 4  # solutions a forward
    gradient_checkpointing: bool = False
    bf16: bool = False  # train in bfloat16 mixed precision
    attention: Literal["auto", "sdpa", "flex_attention", "eager"] = "auto"  # auto: flex_attention on a GPU, else sdpa
    evaluations: Count = 4  # held-out evaluations (and checkpoints) over the run; the best one is kept
    patience: Count | None = None  # stop after so many evaluations without a better pair accuracy; never when null
    logging_steps: Count = 10
    report_to: str = "none"  # none, tensorboard, wandb, ...
    resume: bool = True  # go on from the last checkpoint in output_dir, if there is one
    seed: int = 0
    device: Device = "auto"


@dataclass(frozen=True, config=STRICT, kw_only=True)
class EvaluateConfig:
    """Decode a benchmark with and without System 2, grade, compare: `python -m llm2 evaluate`."""

    model: str  # System 1: a local folder or a hub id
    output_dir: str  # the results folder
    benchmark: Literal["testbed", "gsm8k", "math500"]
    verifier: str | None = None  # folder or hub id of a trained verifier; needed by the guided modes
    modes: tuple[Mode, ...] = ("plain_greedy", "guided_greedy")
    data_file: str | None = None  # local JSON lines with `question` and `answer` in place of the benchmark's own source
    split: str = "test"
    limit: Count | None = None  # the first so many problems; all when null
    chat_template: str | None = None  # name or file (llm2/chat.py); the tokenizer's own when null
    few_shot: str | None = None  # worked examples before each problem: gsm8k-cot (the 8 published ones) or a JSONL file
    shots: Count | None = None  # the first so many of them; all when null
    alpha: Share = 0.1  # a token is plausible from alpha times the top probability
    beta: NonNegative = 0.25  # weight of the verifier's score
    top_k: Count | None = None  # at most so many candidates a step
    samples: Count = 20  # samples a problem in the sampling modes
    majority_at: tuple[Count, ...] = (1, 5, 10, 20)  # the k in tables and paired tests, each at most `samples`
    temperature: Positive = 1.0
    top_p: Share = 1.0
    max_new_tokens: Count = 512
    batch_size: Count = 16  # sequences in flight
    score_samples: bool = True  # the verifier reads every sample: best of k, weighted votes, the report's colours
    solution_score: Literal["mean", "min", "last"] = (
        "mean"  # what ranks a sample: its tokens' mean, worst or last score
    )
    traced_samples: Annotated[int, Field(ge=0)] = 4  # samples a problem and mode that the report shows token by token
    take_over: tuple[str, ...] = ()  # results folders whose predictions count, where they were made with equal settings
    resume: bool = True  # keep what the results folder already holds
    seed: int = 0
    device: Device = "auto"
    dtype: Dtype = "auto"


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SweepConfig(EvaluateConfig):
    """Choose settings on a validation split, report them on the test split: `python -m llm2 sweep`.

    An evaluation, with the settings to be tried beside it: all combinations of the lists that are given.
    """

    alphas: tuple[Share, ...] = ()  # alpha alone when empty; likewise the others
    betas: tuple[NonNegative, ...] = ()
    top_ks: tuple[Count | None, ...] = ()
    temperatures: tuple[Positive, ...] = ()
    validation_split: str = "validation"
    validation_file: str | None = None  # local JSON lines in place of the benchmark's own validation split
    validation_limit: Count | None = None
    choose_by: Mode = "guided_greedy"  # the mode whose accuracy decides; in a sampling mode majority@k of the largest k


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DecodeBenchmark:
    """Guided decoding against transformers' `generate`: `python -m llm2 benchmark`."""

    benchmark: Literal["decode"]
    output: str = "results/benchmark/decode.json"
    hidden_size: Count = 256  # of a Llama with random weights, the shape of both systems
    intermediate_size: Count = 688
    layers: Count = 6
    heads: Count = 8
    key_value_heads: Count = 4
    vocab_size: Count = 8_192
    batch_sizes: tuple[Count, ...] = (1, 32)  # sequences of a call
    prompt_tokens: Count = 64
    new_tokens: Count = 128
    alpha: Share = 0.1
    beta: NonNegative = 0.25
    choice_share: Share = 0.2  # System 1's logits are scaled until this share of the steps has more than one candidate
    lora_rank: Count = 8
    rounds: Count = 5  # alternating runs of each row
    seed: int = 0
    device: Device = "auto"
    dtype: Dtype = "auto"


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ProblemsBenchmark:
    """Problems a second with trained systems, against `generate` at several batch sizes: `python -m llm2 benchmark`."""

    benchmark: Literal["problems"]
    verifier: str  # folder of a trained verifier
    output: str = "results/benchmark/problems.json"
    model: str = "llm2/testbed/system1"
    chat_template: str | None = None  # name or file (llm2/chat.py); the tokenizer's own when null
    problems: Count = 512  # of the testbed's test split
    problems_one_by_one: Count = 64  # of these, for `generate` at batch size 1
    generate_batch_sizes: tuple[Count, ...] = (1, 16, 64, 128, 256)  # 1 among them
    batch_size: Count = 256  # rows in flight of ours
    alpha: Share = 0.1
    beta: NonNegative = 0.5
    max_new_tokens: Count = 200
    rounds: Count = 5  # alternating runs of each row
    device: Device = "auto"


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TrainBenchmark:
    """A training step against the plain way and the bare backbone; reading data: `python -m llm2 benchmark`."""

    benchmark: Literal["train"]
    output: str = "results/benchmark/train.json"
    hidden_size: Count = 256  # of a Llama with random weights
    intermediate_size: Count = 688
    layers: Count = 6
    heads: Count = 8
    key_value_heads: Count = 4
    vocab_size: Count = 8_192
    solutions: tuple[Count, ...] = (1, 8)  # of a step; the plain way runs at the first of these alone
    tokens: Count = 200  # a solution
    pairs: Count = 20  # a solution, evenly spread over its tokens
    lines: Count = 10_000  # of the file that is checked and tokenized
    rounds: Count = 5  # alternating runs of each row
    seed: int = 0
    device: Device = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights


@dataclass(frozen=True, config=STRICT, kw_only=True)
class RolloutBenchmark:
    """Exploration's rollouts against transformers' `generate`: `python -m llm2 benchmark`."""

    benchmark: Literal["rollouts"]
    output: str = "results/benchmark/rollouts.json"
    model: str = "llm2/testbed/system1"  # System 1: a local folder or a hub id
    data: Literal["testbed", "gsm8k"] = "testbed"
    split: str = "train"
    problems: Count = 8  # whose forks' tokens are the prefixes
    chat_template: str | None = None  # name or file (llm2/chat.py); the tokenizer's own when null
    top_k: Count | None = None  # at most so many plausible tokens a position
    rollouts: Count = 8  # continuations of each prefix
    vllm: bool = False  # measure vLLM too, where it is installed; wants top_k
    max_new_tokens: Count = 200
    batch_size: Count = 64  # rows in flight, of both
    rounds: Count = 5  # alternating runs of each row
    seed: int = 0
    device: Device = "auto"
    dtype: Dtype = "auto"


@dataclass(frozen=True, config=STRICT, kw_only=True)
class LabelsBenchmark:
    """The sequential test's labels against an exhaustive reference: `python -m llm2 benchmark`."""

    benchmark: Literal["labels"]
    output: str = "results/benchmark/labels.json"
    explore: str = "configs/testbed/explore.yaml"  # what is held against the reference
    problems: Count = 200  # the first so many
    reference_rollouts: Count = 64  # of every plausible token
    reference_seed: int = 1
    fixed_rollouts: Count = 16  # a token, of the exploration whose cost is compared with


BENCHMARKS = {
    "decode": DecodeBenchmark,
    "problems": ProblemsBenchmark,
    "train": TrainBenchmark,
    "rollouts": RolloutBenchmark,
    "labels": LabelsBenchmark,
}


def benchmark_class(path: str | Path) -> type:
    """Which benchmark a file is for, by its key `benchmark`."""
    values, origin = _read(path)
    found = values.get("benchmark")
    if found not in BENCHMARKS:
        raise UserError(
            f"{origin.get('benchmark', path)}: key 'benchmark': found {found!r}, "
            f"expected: one of {', '.join(BENCHMARKS)}"
        )
    return BENCHMARKS[found]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `2e-5` as a string and `yes` as a truth; here the first is a number, as everyone expects."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(cls: type[Config], path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a YAML file of `cls`'s fields, apply `key=value` overrides (values are YAML too), validate.

    Raises UserError that names the file, the line (or the override), the key, what was found and what was expected.
    """
    values, origin = _read(path)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"the override {override!r} is not of the form key=value")
        values[key], origin[key] = _parse_override(override, text), f"override {override!r}"
    try:
        return cls(**_tuples(values))
    except ValidationError as error:
        raise UserError(_explain(error, cls, path, origin)) from None


def as_dict(config: Any) -> dict[str, Any]:
    """The resolved fields as plain values, ready for YAML or JSON."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def write_config(config: Any, path: str | Path) -> None:
    Path(path).write_text(yaml.safe_dump(as_dict(config), sort_keys=False))


def difference(earlier: dict[str, Any], config: Any, free: tuple[str, ...]) -> str | None:
    """The first key, other than the `free` ones, in which a resumed run would differ from how it was begun."""
    for key, value in as_dict(config).items():
        if key not in free and earlier.get(key) != value:
            return f"{key} was {earlier.get(key)!r} and now is {value!r}"
    return None


def read_values(path: str | Path) -> dict[str, Any]:
    """The plain values of a file that `write_config` wrote."""
    return yaml.load(Path(path).read_text(), Loader=_Loader)


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's values and, per key, where they stand."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None
    try:
        node = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else f"{path}"
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines, found a {type(values).__name__}")
    return values, {key.value: f"{path}, line {key.start_mark.line + 1}" for key, _ in node.value}


def _parse_override(override: str, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"the value of the override {override!r} is not valid YAML") from None


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """YAML has lists where the frozen configs have tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _explain(error: ValidationError, cls: type, path: str | Path, origin: dict[str, str]) -> str:
    """The first mistake, in one sentence."""
    first = error.errors()[0]
    key = str(first["loc"][0])
    where = origin.get(key, str(path))
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = ", ".join(cls.__dataclass_fields__)
        return f"{where}: unknown key {key!r}; the keys of {cls.__name__} are: {known}"
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{where}: the key {key!r} is missing"
    expected = first["msg"][0].lower() + first["msg"][1:]
    return f"{where}: key {key!r}: found {first['input']!r}, expected: {expected}"
