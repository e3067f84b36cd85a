"""Tiny seeded models on the CPU, without network."""

import logging
import os
from collections import Counter

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tests fork, and a child cannot wait for threads that it does not have

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from llm2.common.chat import LLAMA3_PLAIN
from llm2.verifier.model import ProcessVerifier

VOCABULARY = 64


def pytest_addoption(parser):
    parser.addoption("--cases", action="store_true", help="run all cases of all but the slow tests")
    parser.addoption("--slow", action="store_true", help="run all tests, as scripts/test.sh does")


def pytest_collection_modifyitems(config, items):
    """Skip what pyproject.toml's markers leave out."""
    slow, seen = config.getoption("--slow"), Counter()
    cases = slow or config.getoption("--cases")
    for item in items:
        name = item.nodeid.partition("[")[0]
        every = next((marker.args[0] for marker in item.iter_markers("one_in")), 1)
        if not slow and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: pytest --slow, or bash scripts/test.sh"))
        elif not cases and (item.get_closest_marker("long") or seen[name] % every):
            item.add_marker(pytest.mark.skip(reason="left out of the quick tests: pytest --cases"))
        seen[name] += 1


class Deprecations(logging.Handler):
    """Raises what transformers logs as deprecated, where it is called; pyproject.toml does so for warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecat" in (text := record.getMessage()).lower():
            raise DeprecationWarning(text)


logging.getLogger("transformers").addHandler(Deprecations())
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


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, Llama-3's special tokens, no chat template of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|pad|>"
    )
    wrapped.add_special_tokens({"additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>"]})
    return wrapped


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def system1_folder(tmp_path_factory) -> str:
    """A saved System 1 of random weights with its tokenizer and the plain Llama-3 template."""
    folder = tmp_path_factory.mktemp("system1")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = LLAMA3_PLAIN
    tokenizer.save_pretrained(folder)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tiny_system1(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **special).save_pretrained(folder)
    return str(folder)
