"""The Llama that a benchmark's config describes."""

from transformers import LlamaConfig

from llm2.config import DecodeBenchmark, TrainBenchmark


def llama_shape(config: DecodeBenchmark | TrainBenchmark, positions: int) -> LlamaConfig:
    """The shape that both benchmarks with random weights are measured on, for texts of so many tokens."""
    return LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_value_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=positions,
    )
