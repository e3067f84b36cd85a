"""vLLM's general plug-in: the architectures that a prefix head needs. Every vLLM process imports it."""

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
PLUGIN = "LLM2"  # prefix of the architectures of prefix_models.py


def register() -> None:
    """Add the architectures to vLLM's registry."""
    from vllm import ModelRegistry

    for name in ARCHITECTURES:
        ModelRegistry.register_model(PLUGIN + name, f"llm2.vllm.prefix_models:{PLUGIN}{name}")
