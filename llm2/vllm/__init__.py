"""Guided decoding inside vLLM. `GuidedProcessor` is what `--logits-processors llm2.vllm:GuidedProcessor` names.

vLLM is only imported where it is needed: core, settings and server client run without it.
"""

from importlib import import_module

PROCESSORS = {"GuidedProcessor": "processor", "TransformersProcessor": "transformers_processor"}


def __getattr__(name: str):
    if name not in PROCESSORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{PROCESSORS[name]}"), name)
