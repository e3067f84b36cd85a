"""The commands of `python -m llm2` and of a study's steps, each with its config."""

from llm2.baselines.config import FinetuneConfig, OutcomeConfig, PreferConfig, SelfConsistencyConfig
from llm2.config import (
    EvaluateConfig,
    ExploreConfig,
    GenerateConfig,
    PretrainConfig,
    ServeConfig,
    SweepConfig,
    TrainConfig,
)

CONFIGS = {
    "explore": ExploreConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "sweep": SweepConfig,
    "finetune": FinetuneConfig,
    "prefer": PreferConfig,
    "outcome": OutcomeConfig,
    "self-consistency": SelfConsistencyConfig,
    "generate": GenerateConfig,
    "serve": ServeConfig,
    "pretrain": PretrainConfig,
}
