"""The config of every command: a frozen dataclass whose fields are the keys of its YAML file.

`llm2 COMMAND --help` prints the sentence under each key; llm2/common/config_file.py reads YAML files and overrides.
"""

import logging
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from llm2.common.keys import Mark, Reads
from llm2.common.kinds import KINDS, KINDS_WITH, OfKind, with_kind
from llm2.errors import UserError, quote

STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Device = Literal["auto", "cpu", "cuda"]
Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt"]
Kind = Literal[*KINDS]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
# Keys that name a run's inputs, which are compared by content.
Model = Annotated[str, Reads("model")]
OptionalModel = Annotated[str | None, Reads("model")]
File = Annotated[str, Reads("file")]
OptionalFile = Annotated[str | None, Reads("file")]
Code = Annotated[str, Reads("code")]
OptionalCode = Annotated[str | None, Reads("code")]
Output = Annotated[str, Mark.HOW]


class Mode(StrEnum):
    """A way of decoding; its value is its name in metrics.json and predictions.jsonl."""

    PLAIN_GREEDY = "plain_greedy"
    GUIDED_GREEDY = "guided_greedy"
    PLAIN_SAMPLING = "plain_sampling"
    GUIDED_SAMPLING = "guided_sampling"
    PLAIN_SEARCH = "plain_search"
    GUIDED_SEARCH = "guided_search"

    @property
    def guided(self) -> bool:
        return self.startswith("guided")

    @property
    def sampled(self) -> bool:
        return self.endswith("sampling")

    @property
    def searched(self) -> bool:
        return self.endswith("search")


ModeKey = Annotated[Mode, Field(strict=False)]  # a YAML file holds the value


# --- Shared by several commands ---


@dataclass(frozen=True, config=STRICT, kw_only=True)
class CandidateConfig:
    """The plausible set C_t (arXiv 2412.20372)."""

    alpha: Annotated[Share, Mark.GUIDED, Mark.SEARCHED, Mark.SHOWN] = 0.1
    """A token is plausible if its probability is at least alpha times that of the most likely token."""
    top_k: Annotated[Count | None, Mark.GUIDED, Mark.SEARCHED, Mark.SHOWN] = None
    """Limit of plausible tokens per position; no limit when null."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class GuidanceConfig(CandidateConfig):
    """Guided logits on the plausible set: z + beta * s (arXiv 2412.20372)."""

    beta: Annotated[NonNegative | None, Mark.GUIDED, Mark.SHOWN] = 0.25
    """Weight of the verifier's score in the guided logits; null: the weight chosen in its training."""

    def guidance_kwargs(self) -> dict[str, Any]:
        """alpha, beta and top_k, as `Guidance` and `LLM2.from_pretrained` take them."""
        return {name: getattr(self, name) for name in GuidanceConfig.__dataclass_fields__}


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ModelConfig:
    """System 1 and where it runs."""

    model: Annotated[Model, Mark.SHOWN]
    """System 1: a local folder, a GGUF file, a hub id, `smollm2`, or `testbed` for the embedded one."""
    chat_template: OptionalFile = None
    """Chat template: llama3-plain, chatml-plain, base or a Jinja file; the tokenizer's own when null."""
    device: Annotated[Device, Mark.HOW] = "auto"
    """Device of the models; auto is the GPU if there is one."""
    seed: Annotated[Seed, Mark.SAMPLED, Mark.SHOWN, Mark.TRAINER] = 0
    """Seed of all random numbers."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TaskConfig:
    """The problems, and how answers are graded."""

    task: Code
    """gsm8k, math500, mawps, svamp, testbed, chats, or MODULE:CLASS of another task (llm2/tasks/README.md)."""
    data_file: OptionalFile = None
    """Local JSON Lines file in the task's format, instead of its source; required for chats."""
    limit: Annotated[Count | None, Mark.WHICH] = None
    """Number of leading problems; all when null."""
    grader: OptionalCode = None
    """MODULE:FUNCTION of (text, gold) -> bool that grades a solution; the task's grading when null."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class EngineConfig:
    """The engine that decodes, and where it runs."""

    engine: Literal["llm2", "vllm"] = "llm2"
    """Engine that decodes; vllm is installed separately, and explore then needs top_k."""
    dtype: Dtype = "auto"
    """Dtype; auto: the checkpoint's on a GPU, float32 on a CPU; explore and evaluate may choose bfloat16 there."""
    float16_weights: bool = False
    """On an x86 CPU: decode in float32 with float16 copies of the weights of linear layers, which is faster."""
    tensor_parallel: Annotated[Count, Mark.HOW] = 1
    """GPUs per vLLM engine."""
    max_model_len: Count | None = None
    """Maximum tokens of a sequence in vLLM, including the prompt; the model's limit when null."""
    memory_share: Annotated[Share | None, Mark.HOW] = None
    """Share of each device's memory that vLLM takes, without memory for scores and traces; its default when null."""
    server: Annotated[str | None, Mark.HOW] = None
    """With engine vllm: URL of a vLLM server (http://HOST:8000/v1) to use instead of an engine in this process."""
    server_requests: Annotated[Count, Mark.HOW] = 64
    """Concurrent requests to the vLLM server."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DecodingConfig(GuidanceConfig, EngineConfig):
    """How System 1 is decoded, with System 2 or without."""

    logits_processor: Annotated[OptionalCode, Mark.SHOWN] = None
    """MODULE:CLASS, made with the tokenizer, of a transformers processor of System 1's logits, in plain modes too."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class RolloutConfig(ModelConfig, DecodingConfig):
    """Rollouts: continuations of prefixes by System 1, alone or guided."""

    verifier: OptionalModel = None
    """Verifier that guides rollouts and own solutions, with weight beta; System 1 alone when null."""
    temperature: NonNegative = 1.0
    """Sampling temperature of rollouts; 0 is greedy."""
    top_p: Share = 1.0
    """Nucleus sampling: rollouts are drawn from the most likely tokens that together have this probability."""
    max_new_tokens: Count = 512
    """Limit of new tokens per rollout."""
    stop_pattern: str | None = None
    """Regular expression that ends a rollout (not an own solution) behind its match; engine llm2 only."""
    batch_size: Annotated[Count, Mark.HOW] = 64
    """Rollouts generated at the same time."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SamplesConfig(TaskConfig, RolloutConfig):
    """Solutions sampled from System 1, alone or guided."""

    split: str = "train"
    """Split of the task whose problems are solved."""
    solution_samples: Count = 8
    """Solutions sampled per problem."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SolutionsConfig(SamplesConfig):
    """Right solutions: the task's gold ones, or own ones, which only need a grader."""

    solutions: Literal["gold", "own"] = "gold"
    """The task's gold solutions, or right ones sampled from System 1, guided if there is a verifier."""
    max_solutions: Annotated[Count, Mark.WHICH] = 1
    """Number of distinct right solutions kept per problem with solutions=own."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class StoppingRule:
    """Stopping rule of the sequential test of a token (llm2/exploration/quality.py)."""

    quality_margin: Share = 0.35
    """A negative's quality is below the gold token's by more than this margin."""
    confidence: Share = 0.85
    """A token is a negative once the posterior probability of exceeding quality_margin is at least this."""
    futility: Share = 0.03
    """A token is as good as gold once the posterior probability of exceeding quality_margin is at most this."""
    gold_rollouts: Count = 10
    """Rollouts of each fork's gold token, counting those reused from earlier forks."""
    min_rollouts: Count = 2
    """Rollouts of a token before it can be a negative."""
    rollouts_step: Count = 1
    """Rollouts added at a time while a token is undecided."""
    max_rollouts: Count = 8
    """Rollouts after which an undecided token is dropped."""
    skip_hopeless: bool = False
    """Where gold rarely succeeds no token is clearly worse: end gold's rollouts early, and look for later forks."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class OptimizerConfig:
    """How a model is trained."""

    num_train_epochs: Annotated[Positive, Mark.SHOWN, Mark.TRAINER] = 2.0
    """Passes over the training data."""
    learning_rate: Annotated[Positive, Mark.SHOWN, Mark.TRAINER] = 2e-5
    """Peak learning rate."""
    lr_scheduler_type: Annotated[Schedule, Mark.TRAINER] = "cosine"
    """Learning rate schedule after warm-up."""
    warmup_ratio: Share = 0.1
    """Share of the optimizer steps in which the learning rate rises from 0 to its peak."""
    weight_decay: Annotated[NonNegative, Mark.TRAINER] = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: Annotated[NonNegative, Mark.TRAINER] = 1.0
    """Gradients are clipped to this norm."""
    global_batch_size: Annotated[Count, Mark.SHOWN] = 128
    """Solutions, or pairs of them, per optimizer step, over all processes and accumulation steps."""
    per_device_train_batch_size: Annotated[Count, Mark.TRAINER] = 4
    """Solutions, or pairs of them, per forward on each device."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    bf16: Annotated[bool | Literal["auto"], Mark.TRAINER] = "auto"
    """Train in bfloat16 mixed precision; auto: on a CPU that multiplies in it, for more than 10 million parameters."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class VerifierSpec(OfKind):
    """What a verifier is: what its scores are read from, and which weights are its own.

    Raises UserError for a key that the kind does not have. Earlier versions' `score` and `prefix_head` are understood.
    """

    kind: Annotated[Kind, Mark.SHOWN] = "full"
    """full (the paper's) and lora read candidates, prefix and prefix_lora do not; bilinear, mlp: heads on System 1."""
    lora_r: Count | None = None
    """Rank of the LoRA adapters on System 1's frozen weights; null is 16."""
    lora_alpha: Positive = 32.0
    """LoRA adapters are scaled by lora_alpha / lora_r."""
    lora_dropout: Share = 0.0
    """Dropout probability on the input of the LoRA adapters."""
    lora_target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the layers that get LoRA adapters."""
    prefix_head_size: Count = 8
    """Rank of a bilinear head, width of an mlp."""
    token_weight: bool = False
    """Learn a factor of the scores from each prefix's state: how far to trust them there."""

    @model_validator(mode="before")
    @classmethod
    def _name_the_kind(cls, given: Any) -> Any:
        values = with_kind(given.kwargs or {})
        if values.keys() - (given.kwargs or {}):
            message = "write kind: %s instead of score, prefix_head or lora_r alone"
            logging.getLogger("llm2").warning(message, values["kind"])
        return type(given)(given.args, values)

    @model_validator(mode="after")
    def _check_keys_of_kinds(self) -> Self:
        for key, field in type(self).__dataclass_fields__.items():
            value, kinds = getattr(self, key), KINDS_WITH.get(key, KINDS)
            if self.kind not in kinds and value != field.default:
                raise UserError(f"{key}: found {quote(value)} with kind: {self.kind}, expected {' or '.join(kinds)}")
        if self.is_adapter and self.lora_r is None:
            object.__setattr__(self, "lora_r", 16)
        return self


# --- The commands ---


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ExploreConfig(SolutionsConfig, StoppingRule):
    """Token quality exploration: make triplets from right solutions."""

    output: Output
    """Triplets file to write, JSON lines; every verdict goes to OUTPUT.pairs.jsonl, counts to OUTPUT.report.json."""
    max_triplets: Count | None = None
    """Number of triplets kept per solution, the most informative ones; all when null."""
    negatives: Literal["explored", "plausible", "sampled", "contrast", "random"] = "explored"
    """Tokens that become negatives: by rollouts, or without them (llm2/exploration/negatives.py)."""
    negatives_per_fork: Count = 4
    """Draws per fork, with replacement, for negatives sampled, contrast and random."""
    contrast_model: OptionalModel = None
    """For negatives=contrast, a better model with System 1's tokenizer, such as a fine-tuned System 1."""
    contrast_weight: NonNegative = 1.0
    """For negatives=contrast, w in the logits z1 + w * (z1 - z2) of System 1 and the contrast model."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TrainConfig(ModelConfig, OptimizerConfig, VerifierSpec):
    """Train the verifier on triplets or labelled steps."""

    train_file: File
    """Training data, JSON Lines: triplets, an exploration's verdicts (OUTPUT.pairs.jsonl), or labelled steps."""
    output_dir: Annotated[Output, Mark.TRAINER]
    """Folder for the verifier and its checkpoints."""
    device: Device = "auto"
    """Device that trains; auto is the GPU if there is one. A run ends on the one that it began on."""
    further_files: Annotated[tuple[str, ...], Reads("file")] = ()
    """Further training files, such as the second round of an exploration."""
    limit: Count | None = None
    """Number of leading solutions of train_file; all when null."""
    eval_file: OptionalFile = None
    """Held-out triplets; when null a share of train_file is held out."""
    eval_share: Share = 0.05
    """Share of the problems held out, with all their solutions, if there is no eval_file."""
    max_length: Count = 2048
    """Solutions are truncated to this many tokens; later pairs are dropped and counted."""
    init_from: OptionalModel = None
    """A trained verifier of the same kind to go on from, on other data; null: System 1's weights and a new head."""
    trainable_layers: Annotated[int, Field(ge=0)] | None = None
    """Train only the head and this many of the highest layers; everything when null."""
    guided_beta: Positive | None = None
    """Train on guided margins, System 1's plus this times the scores', as decoding adds them; null: on scores alone."""
    best_by: Literal["pair_accuracy", "choice_quality", "guided_pair_loss"] | None = None
    """Held-out metric that chooses the checkpoint; null: that of the loss, or choice_quality with soft targets."""
    quality_weight: bool = False
    """Weight each pair by the difference in quality of its tokens (key `quality` of the file)."""
    label_smoothing: Share = 0.0
    """Label smoothing: share of each pair's target that is moved to 0.5, so that margins stay finite."""
    dropout: Share = 0.0
    """Dropout probability on the states that scores are read from."""
    margin: NonNegative = 0.0
    """Margin m in the loss -log sigmoid(s(gold) - s(negative) - m)."""
    lm_loss_coef: NonNegative = 0.0
    """Weight of an auxiliary language-model loss on the solutions' tokens."""
    attn_implementation: Literal["auto", "sdpa", "flex_attention", "eager"] = "auto"
    """Attention implementation; auto is flex_attention on a GPU and sdpa elsewhere."""
    evaluations: Count = 4
    """Held-out evaluations (and checkpoints) over the run; the best checkpoint is kept."""
    early_stopping_patience: Count | None = None
    """Stop after this many evaluations without a better checkpoint (`best_by`); never when null."""
    logging_steps: Annotated[Count, Mark.HOW, Mark.TRAINER] = 10
    """Optimizer steps between log lines."""
    report_to: Annotated[str, Mark.HOW, Mark.TRAINER] = "none"
    """Where the Trainer reports metrics: none, tensorboard, wandb, ..."""
    resume: Annotated[bool, Mark.HOW] = True
    """Resume from the last checkpoint in output_dir, if there is one."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class EvaluateConfig(TaskConfig, ModelConfig, DecodingConfig):
    """Decode a task with and without System 2, grade, compare."""

    output_dir: Output
    """Results folder to write."""
    verifier: Annotated[OptionalModel, Mark.GUIDED, Mark.SCORES, Mark.SHOWN] = None
    """Trained verifier, a local folder or a hub id; the guided modes need one."""
    contrast: Annotated[OptionalModel, Mark.GUIDED, Mark.SHOWN] = None
    """Instead of a verifier, a model whose logits minus System 1's are the score, such as a fine-tuned System 1."""
    modes: Annotated[tuple[ModeKey, ...], Mark.WHICH] = (Mode.PLAIN_GREEDY, Mode.GUIDED_GREEDY)
    """Ways of decoding: plain_greedy, guided_greedy, plain_sampling, guided_sampling, plain_search, guided_search."""
    split: str = "test"
    """Split of the task to evaluate on."""
    few_shot: Annotated[OptionalFile, Mark.SHOWN] = None
    """Worked examples before each problem: gsm8k-cot (the 8 published ones) or a JSON lines file."""
    num_fewshot: Annotated[Count | None, Mark.SHOWN] = None
    """Number of few-shot examples; all when null."""
    num_samples: Annotated[Count, Mark.SAMPLED, Mark.SHOWN] = 20
    """Samples per problem in the sampling modes."""
    majority_at: Annotated[tuple[Count, ...], Field(min_length=1), Mark.WHICH] = (1, 5, 10, 20)
    """Values of k in tables and paired tests, each at most num_samples."""
    temperature: Annotated[Positive, Mark.SAMPLED, Mark.SHOWN] = 1.0
    """Sampling temperature in the sampling modes."""
    top_p: Annotated[Share, Mark.SAMPLED, Mark.SHOWN] = 1.0
    """Nucleus sampling: samples are drawn from the most likely tokens that together have this probability."""
    search_solutions: Annotated[Count, Mark.SEARCHED, Mark.SHOWN] = 8
    """Solutions per problem in the search modes, at most; a problem with a sure answer gets fewer."""
    accept: Annotated[OptionalCode, Mark.SHOWN] = None
    """MODULE:FUNCTION of a question and a solution's text; what it refuses has no vote, and a search goes on."""
    max_new_tokens: Count = 512
    """Limit of new tokens per solution."""
    batch_size: Annotated[Count | Literal["auto"], Mark.HOW] = 16
    """Sequences decoded at the same time; auto is as many as fit a GPU's memory, 64 on a CPU."""
    score_samples: Annotated[bool, Mark.GUIDED] = True
    """Score samples with the verifier, for best of k and weighted votes; if false, greedy ones in the report alone."""
    solution_score: Annotated[Literal["mean", "min", "last"], Mark.GUIDED, Mark.SCORES] = "mean"
    """Score of a sample: the mean, lowest or last score of its tokens."""
    traced_samples: Annotated[int, Field(ge=0), Mark.WHICH] = 4
    """Samples per problem and mode that the report shows token by token."""
    reuse_from: Annotated[tuple[str, ...], Mark.HOW] = ()
    """Results folders whose predictions are reused if they were made with equal settings."""
    resume: Annotated[bool, Mark.HOW] = True
    """Keep the existing predictions in the results folder."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ScoreConfig(ModelConfig):
    """Rank finished solutions by the verifier's scores: best of n, weighted votes."""

    file: File
    """JSON lines of `messages`, `solutions` (texts or lists of steps) and for grading `gold`; or the first argument."""
    output: Output
    """File to write: the same lines with `scores`, `best` (an index) and, with a task, `answers` and `vote`."""
    verifier: Model
    """Trained verifier, a local folder or a hub id."""
    reduction: Literal["mean", "min", "last", "product"] = "mean"
    """Score of a solution: mean, lowest or last score of its tokens or steps; product: sum of their log sigmoids."""
    task: OptionalCode = None
    """Task whose answers are extracted for weighted votes, and graded where every line has `gold`."""
    batch_size: Annotated[Count, Mark.HOW] = 16
    """Solutions of a forward."""
    dtype: Dtype = "auto"
    """Dtype of the models; auto is the checkpoint's on a GPU, float32 on a CPU."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SweepConfig(EvaluateConfig):
    """Choose alpha, beta, top_k and temperature on a validation split, report them on the test split.

    An evaluation with lists of settings to try, in all combinations.
    """

    alphas: tuple[Share, ...] = ()
    """Values of alpha to try; only the key alpha when empty."""
    betas: tuple[NonNegative, ...] = ()
    """Values of beta to try; only the key beta when empty."""
    top_ks: tuple[Count | None, ...] = ()
    """Values of top_k to try; only the key top_k when empty."""
    temperatures: tuple[Positive, ...] = ()
    """Sampling temperatures to try; only the key temperature when empty."""
    validation_split: str = "validation"
    """Split of the task on which settings are compared."""
    validation_file: OptionalFile = None
    """Local JSON lines in place of the task's own validation split."""
    validation_limit: Count | None = None
    """Number of leading validation problems; all when null."""
    choose_by: ModeKey = Mode.GUIDED_GREEDY
    """Mode whose accuracy decides; in a sampling mode majority@k of the largest k."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ServeConfig(ModelConfig, DecodingConfig):
    """Serve System 1, guided where a request asks for it, by vLLM's OpenAI-compatible server."""

    verifier: str
    """Trained verifier, a local folder or a hub id."""
    guide_by_default: bool = False
    """Guide requests without llm2_beta too, with alpha, beta and top_k; otherwise they are plain."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    batch_size: Count = 256
    """Sequences decoded at the same time (vLLM's max_num_seqs)."""
    data_parallel: Count = 1
    """Engines behind the one address, each on tensor_parallel GPUs."""
