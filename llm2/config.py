"""The keys of every command: one frozen dataclass each, which its YAML file mirrors one to one.

A sentence under each key says what it does; `python -m llm2 COMMAND --help` prints them. Reading files and overrides is
in llm2/common/config_file.py.
"""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Mode(StrEnum):
    """A way of decoding; the values name it in metrics.json and predictions.jsonl."""

    PLAIN_GREEDY = "plain_greedy"
    GUIDED_GREEDY = "guided_greedy"
    PLAIN_SAMPLING = "plain_sampling"
    GUIDED_SAMPLING = "guided_sampling"

    @property
    def guided(self) -> bool:
        return self in (Mode.GUIDED_GREEDY, Mode.GUIDED_SAMPLING)

    @property
    def sampled(self) -> bool:
        return self in (Mode.PLAIN_SAMPLING, Mode.GUIDED_SAMPLING)


ModeKey = Annotated[Mode, Field(strict=False)]  # a YAML file holds its name


# --- What several commands share ---


@dataclass(frozen=True, config=STRICT, kw_only=True)
class CandidateConfig:
    """The plausible set C_t (arXiv 2412.20372)."""

    alpha: Share = 0.1
    """A token is plausible from alpha times the probability of the likeliest token."""
    top_k: Count | None = None
    """At most so many plausible tokens a position; no limit when null."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class GuidanceConfig(CandidateConfig):
    """Guided logits on the plausible set: z + beta * s (arXiv 2412.20372)."""

    beta: NonNegative = 0.25
    """Weight of the verifier's score."""

    def guidance(self) -> dict[str, Any]:
        """alpha, beta and top_k, as `Guidance` and `LLM2.from_pretrained` take them."""
        return {name: getattr(self, name) for name in GuidanceConfig.__dataclass_fields__}


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ModelConfig:
    """System 1 and where it runs."""

    model: str
    """System 1: a local folder, a hub id, or `testbed` for the embedded one."""
    chat_template: str | None = None
    """Chat template: llama3-plain, chatml-plain or a Jinja file; the tokenizer's own when null."""
    device: Device = "auto"
    """auto takes the GPU if there is one."""
    seed: int = 0


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TaskConfig:
    """Which problems, and what counts as a right answer."""

    task: str
    """gsm8k, math500, testbed, chats, or MODULE:CLASS of your own (llm2/tasks/README.md)."""
    data_file: str | None = None
    """Local JSON lines in the task's format, read in place of its own source; chats needs one."""
    limit: Count | None = None
    """The first so many problems; all when null."""
    grader: str | None = None
    """MODULE:FUNCTION of (text, gold) -> bool that says whether an answer is right; the task's own when null."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class RolloutConfig(ModelConfig, CandidateConfig):
    """Many sampled continuations of many prefixes by System 1, and the engine that writes them."""

    engine: Literal["llm2", "vllm"] = "llm2"
    """What writes the rollouts; vllm is an extra that is installed separately, and wants top_k."""
    temperature: NonNegative = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Share = 1.0
    max_new_tokens: Count = 512
    """New tokens per rollout."""
    stop_pattern: str | None = None
    """A regular expression that ends a rollout whose answer is decided; engine llm2 only."""
    batch_size: Count = 64
    """Rollouts in flight."""
    dtype: Dtype = "auto"
    """auto is the checkpoint's own on a GPU and float32 on a CPU."""
    tensor_parallel: Count = 1
    """GPUs of one vLLM engine."""
    server: str | None = None
    """With engine vllm: the URL of a vLLM server (http://HOST:8000/v1) in place of an engine in process."""
    server_requests: Count = 64
    """Requests in flight at that server."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class StoppingRule:
    """When the test of a token asks for more rollouts, and when it stops (llm2/exploration/quality.py)."""

    quality_margin: Share = 0.35
    """A negative's quality is below the gold token's by more than this ..."""
    confidence: Share = 0.85
    """... with at least this posterior probability."""
    futility: Share = 0.03
    """A token is as good as gold once that probability is at most this."""
    gold_rollouts: Count = 10
    """Rollouts of the gold token of a fork; those that pass through it are counted."""
    min_rollouts: Count = 2
    """Rollouts of another token before it can be a negative."""
    rollouts_step: Count = 1
    """Rollouts added while a token is undecided."""
    max_rollouts: Count = 8
    """Rollouts after which an undecided token is given up."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class LlamaShape:
    """Shape of a Llama with random weights."""

    hidden_size: Count = 256
    intermediate_size: Count = 688
    num_hidden_layers: Count = 6
    num_attention_heads: Count = 8
    num_key_value_heads: Count = 4
    vocab_size: Count = 8_192


# --- The commands ---


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ExploreConfig(TaskConfig, RolloutConfig, StoppingRule):
    """Token quality exploration: gold solutions in, triplets out."""

    output: str
    """The triplets, JSON lines; OUTPUT.pairs.jsonl holds every verdict, OUTPUT.report.json the counts."""
    split: str = "train"
    max_triplets: Count | None = None
    """A solution keeps at most so many triplets, the most informative ones; all when null."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TrainConfig(ModelConfig):
    """Train the verifier on triplets."""

    train_file: str
    """Triplets, JSON lines."""
    output_dir: str
    """The verifier and its checkpoints."""
    eval_file: str | None = None
    """Held-out triplets; when null a share of train_file is held out."""
    eval_share: Share = 0.05
    """Share of the solutions held out when there is no eval_file."""
    max_length: Count = 2048
    """Pairs at or beyond this position are dropped, and counted."""
    lora_r: Count | None = None
    """Train LoRA adapters of this rank on System 1's frozen weights; all weights when null."""
    lora_alpha: Positive = 32.0
    """Adapters are scaled by lora_alpha / lora_r."""
    lora_dropout: Share = 0.0
    lora_target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the adapted layers."""
    quality_weight: bool = False
    """Weight a pair by gold's quality less the negative's (key `quality` of the file)."""
    margin: NonNegative = 0.0
    """Margin m in -log sigmoid(s(gold) - s(negative) - m)."""
    lm_loss_coef: NonNegative = 0.0
    """Weight of an auxiliary language-model loss on the solutions' tokens."""
    num_train_epochs: Positive = 2.0
    learning_rate: Positive = 2e-5
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt"] = "cosine"
    warmup_ratio: Share = 0.1
    """Share of the steps."""
    weight_decay: NonNegative = 0.0
    max_grad_norm: NonNegative = 1.0
    global_batch_size: Count = 128
    """Solutions an optimizer step, over all processes and accumulation."""
    per_device_train_batch_size: Count = 4
    """Solutions a forward."""
    gradient_checkpointing: bool = False
    bf16: bool = False
    """Train in bfloat16 mixed precision."""
    attn_implementation: Literal["auto", "sdpa", "flex_attention", "eager"] = "auto"
    """auto is flex_attention on a GPU and sdpa elsewhere."""
    evaluations: Count = 4
    """Held-out evaluations (and checkpoints) over the run; the best one is kept."""
    early_stopping_patience: Count | None = None
    """Stop after so many evaluations without a better pair accuracy; never when null."""
    logging_steps: Count = 10
    report_to: str = "none"
    """none, tensorboard, wandb, ..."""
    resume: bool = True
    """Go on from the last checkpoint in output_dir, if there is one."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class EvaluateConfig(TaskConfig, ModelConfig, GuidanceConfig):
    """Decode a task with and without System 2, grade, compare."""

    output_dir: str
    """The results folder."""
    verifier: str | None = None
    """Folder or hub id of a trained verifier; the guided modes need one."""
    modes: tuple[ModeKey, ...] = (Mode.PLAIN_GREEDY, Mode.GUIDED_GREEDY)
    """Ways of decoding; plain_ and guided_, _greedy and _sampling."""
    split: str = "test"
    few_shot: str | None = None
    """Worked examples before each problem: gsm8k-cot (the 8 published ones) or a JSON lines file."""
    num_fewshot: Count | None = None
    """The first so many of them; all when null."""
    num_samples: Count = 20
    """Samples a problem in the sampling modes."""
    majority_at: tuple[Count, ...] = (1, 5, 10, 20)
    """The k in tables and paired tests, each at most num_samples."""
    temperature: Positive = 1.0
    top_p: Share = 1.0
    max_new_tokens: Count = 512
    batch_size: Count = 16
    """Sequences in flight."""
    score_samples: bool = True
    """Let the verifier score every sample: for best of k, weighted votes and the report's colours."""
    solution_score: Literal["mean", "min", "last"] = "mean"
    """What ranks a sample: its tokens' mean, lowest or last score."""
    traced_samples: Annotated[int, Field(ge=0)] = 4
    """Samples a problem and mode that the report shows token by token."""
    reuse_from: tuple[str, ...] = ()
    """Results folders whose predictions are reused where they were made with equal settings."""
    resume: bool = True
    """Keep what the results folder already holds."""
    dtype: Dtype = "auto"
    """auto is the checkpoint's own on a GPU and float32 on a CPU."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SweepConfig(EvaluateConfig):
    """Choose alpha, beta, top_k and temperature on a validation split, report them on the test split.

    An evaluation, with the settings to be tried beside it: all combinations of the lists that are given.
    """

    alphas: tuple[Share, ...] = ()
    """Values of alpha to try; alpha alone when empty."""
    betas: tuple[NonNegative, ...] = ()
    top_ks: tuple[Count | None, ...] = ()
    temperatures: tuple[Positive, ...] = ()
    validation_split: str = "validation"
    validation_file: str | None = None
    """Local JSON lines in place of the task's own validation split."""
    validation_limit: Count | None = None
    choose_by: ModeKey = Mode.GUIDED_GREEDY
    """The mode whose accuracy decides; in a sampling mode majority@k of the largest k."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class PretrainConfig(LlamaShape):
    """Train the testbed's System 1 from scratch."""

    output_dir: str
    """Folder for the model, its tokenizer and its card."""
    hidden_size: Count = 160
    intermediate_size: Count = 432
    num_hidden_layers: Count = 4
    num_attention_heads: Count = 5
    num_key_value_heads: Count = 5
    vocab_size: Count = 640
    """Tokens of byte-level BPE, digits one by one."""
    documents: Count = 115_200
    """Solved problems in the careless corpus."""
    max_steps: Count = 3_600
    batch_size: Count = 32
    """Documents a step."""
    learning_rate: Positive = 2e-3
    warmup_ratio: Share = 0.05
    """Share of the steps."""
    save_steps: Count = 250
    """A checkpoint to resume from, every so many steps."""
    card_problems: Count = 500
    """Validation problems that the model card's figures rest on."""
    seed: int = 0
