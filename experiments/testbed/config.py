"""The configs of what makes the testbed: its System 1 and its generated files."""

from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from llm2.common.keys import Mark
from llm2.config import STRICT, Count, Output, Positive, Seed, Share


@dataclass(frozen=True, config=STRICT, kw_only=True)
class PretrainConfig:
    """Train the testbed's System 1 from scratch."""

    output_dir: Output
    """Folder for the model, its tokenizer and its model card."""
    hidden_size: Count = 160
    """Width of the hidden states."""
    intermediate_size: Count = 432
    """Width of the feed-forward layers."""
    num_hidden_layers: Count = 4
    """Number of transformer layers."""
    num_attention_heads: Count = 5
    """Number of query heads per layer."""
    num_key_value_heads: Count = 5
    """Number of key-value heads per layer."""
    vocab_size: Count = 640
    """Limit of tokens of the byte-level BPE, one per digit."""
    documents: Count = 115_200
    """Solved problems in the careless corpus."""
    max_steps: Count = 3_600
    """Number of optimizer steps."""
    batch_size: Count = 32
    """Documents per optimizer step."""
    learning_rate: Positive = 2e-3
    """Peak learning rate; the schedule is cosine."""
    warmup_ratio: Share = 0.05
    """Share of the optimizer steps in which the learning rate rises from 0 to its peak."""
    save_steps: Count = 250
    """Optimizer steps between checkpoints to resume from."""
    card_problems: Annotated[Count, Mark.WHICH] = 500
    """Validation problems for the figures of the model card."""
    seed: Seed = 0
    """Seed of the corpus, the weights and the order of the documents."""

    def shape(self) -> dict[str, int]:
        """The keys that `LlamaConfig` takes, with their values."""
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
        return {name: getattr(self, name) for name in (*names, "num_attention_heads", "num_key_value_heads")}


@dataclass(frozen=True, config=STRICT, kw_only=True)
class GenerateConfig:
    """Write problems of the testbed, or what a System 1 with two skills is trained on, as JSON lines."""

    output: Output
    """File to write."""
    regime: Literal[
        "same", "foreign", "answers", "careful", "two_skills", "more_steps", "new_words", "large_numbers", "sorting"
    ] = "same"
    """What the gold solutions are like (experiments/testbed/README.md)."""
    split: Literal["pretrain", "train", "validation", "test"] = "train"
    """Split of the regime."""
    limit: Count | None = None
    """Number of problems, the first ones; all when null."""
    corpus: bool = False
    """Write limit conversations of the corpus of two skills instead, for task=chats."""
    seed: Seed = 0
    """Seed of the corpus."""
