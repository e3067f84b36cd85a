"""LLM2: a language model proposes plausible next tokens, a token-level process verifier chooses among them."""

__all__ = ["LLM2", "ProcessVerifier"]


def __getattr__(name: str):
    """The public names, imported at their first use: importing torch and transformers takes seconds."""
    if name == "LLM2":
        from llm2.decoding.llm2 import LLM2

        return LLM2
    if name == "ProcessVerifier":
        from llm2.verifier.model import ProcessVerifier

        return ProcessVerifier
    raise AttributeError(f"module 'llm2' has no attribute {name!r}")
