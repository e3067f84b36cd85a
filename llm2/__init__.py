"""LLM2: a language model proposes plausible next tokens, a token-level process verifier chooses among them."""

from importlib import import_module

__version__ = "0.1.0"  # pyproject.toml's
PUBLIC = {
    "LLM2": "llm2.decoding.llm2",
    "Guidance": "llm2.decoding.sampling",
    "GuidedLogitsProcessor": "llm2.decoding.logits_processor",
    "ProcessVerifier": "llm2.verifier.model",
    "VerifierTrainer": "llm2.verifier.trainer",
    "VerifierTrainingArguments": "llm2.verifier.arguments",
    "Task": "llm2.tasks",
    "Problem": "llm2.tasks",
    "ExploreConfig": "llm2.config",
    "TrainConfig": "llm2.config",
    "EvaluateConfig": "llm2.config",
    "explore": "llm2.exploration.explore",
    "train": "llm2.verifier.train",
    "evaluate": "llm2.evaluation.evaluate",
    "UserError": "llm2.errors",
}
__all__ = [*PUBLIC, "__version__"]


def __getattr__(name: str):
    """The public names, imported at their first use: importing torch and transformers takes seconds."""
    if name in PUBLIC:
        return getattr(import_module(PUBLIC[name]), name)
    raise AttributeError(f"module 'llm2' has no attribute {name!r}")
