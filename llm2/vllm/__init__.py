"""Guided decoding inside vLLM. `GuidedProcessor` is what `--logits-processors llm2.vllm:GuidedProcessor` names.

vLLM is only imported where it is needed: core, settings and server client run without it.
"""


def __getattr__(name: str):
    if name != "GuidedProcessor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llm2.vllm.processor import GuidedProcessor

    return GuidedProcessor
