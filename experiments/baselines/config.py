"""The configs of the rivals' commands."""

from typing import Annotated

from pydantic.dataclasses import dataclass

from llm2.common.keys import Mark, Reads
from llm2.config import (
    STRICT,
    Count,
    File,
    Mode,
    ModeKey,
    ModelConfig,
    OptimizerConfig,
    OptionalCode,
    Output,
    Positive,
    SamplesConfig,
    Seed,
    SolutionsConfig,
)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class FinetuneConfig(SolutionsConfig, OptimizerConfig):
    """Fine-tune System 1 on gold solutions, or by rejection sampling on its own right ones (solutions=own)."""

    output_dir: Annotated[Output, Mark.TRAINER]
    """Folder for the fine-tuned System 1."""
    replay_task: OptionalCode = None
    """Another task, of which as many gold solutions are mixed in, so that System 1 does not forget it."""
    output_rank: Count | None = None
    """Train only a low-rank edit of the output layer, of this rank; everything when null."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class PreferConfig(ModelConfig, OptimizerConfig):
    """Fine-tune System 1 to prefer gold tokens to negatives: DPO's loss on the triplets of a verifier."""

    train_file: File
    """What to train on, JSON lines: triplets, or an exploration's verdicts (OUTPUT.pairs.jsonl) as soft targets."""
    output_dir: Annotated[Output, Mark.TRAINER]
    """Folder for the fine-tuned System 1."""
    preference_beta: Positive = 0.1
    """Weight b of the log-ratios to System 1 in -log sigmoid(b * (log-ratio of gold - log-ratio of the negative))."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class OutcomeConfig(SamplesConfig, OptimizerConfig):
    """Train a verifier of finished solutions on right and wrong samples of System 1: an outcome score."""

    output_dir: Annotated[Output, Mark.TRAINER]
    """Folder for the verifier; evaluate it with modes=[plain_sampling] solution_score=last."""
    max_pairs: Count = 4
    """Pairs of a right and a wrong solution per problem, at most."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SelfConsistencyConfig:
    """Compare a majority of plain samples with a mode of another evaluation at equal generated tokens."""

    samples: Annotated[str, Reads("results")]
    """Results folder with the mode plain_sampling."""
    against: Annotated[str, Reads("results")]
    """Results folder of the same problems to compare with."""
    mode: ModeKey = Mode.GUIDED_GREEDY
    """Its mode."""
    majority_at: Count = 1
    """Samples of that mode, if it samples, that vote."""
    output: Output
    """JSON file to write."""
    seed: Seed = 0
    """Seed of the bootstrap."""
