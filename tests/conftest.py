"""Tiny seeded models on the CPU, without network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llm2.verifier import ProcessVerifier

VOCABULARY = 64
torch.set_num_threads(1)  # tiny tensors: a second thread only waits


def tiny_system1(seed: int = 0, **changes) -> PreTrainedModel:
    """A random Llama; its weights are scaled up, so that greedy decoding does not sit on near ties."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            **changes,
        }
    )
    return LlamaForCausalLM(config).eval()


def tiny_verifier(folder, seed: int = 1, **changes) -> ProcessVerifier:
    """Made as every verifier is, from a saved System 1; another seed than its System 1, so that they disagree."""
    tiny_system1(seed, **changes).save_pretrained(folder)
    torch.manual_seed(seed)
    return ProcessVerifier.from_system1(str(folder), local_files_only=True).eval()


@pytest.fixture(scope="session")
def system1() -> PreTrainedModel:
    return tiny_system1()


@pytest.fixture(scope="session")
def verifier(tmp_path_factory) -> ProcessVerifier:
    return tiny_verifier(tmp_path_factory.mktemp("system1"))
