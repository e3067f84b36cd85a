"""The Llama that a benchmark's config describes."""

from transformers import LlamaConfig

from llm2.config import LlamaShape


def llama_shape(shape: LlamaShape, positions: int) -> LlamaConfig:
    """The Llama of this shape, for texts of so many tokens."""
    sizes = {name: getattr(shape, name) for name in LlamaShape.__dataclass_fields__}
    return LlamaConfig(**sizes, max_position_embeddings=positions)
