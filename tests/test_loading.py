"""Models by name: `testbed` is the embedded System 1 wherever the process runs; others are refused in one sentence."""

import logging
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm2.common import loading
from llm2.common.loading import (
    TESTBED,
    eos_ids,
    eos_ids_by_name,
    is_local,
    load_backbone,
    load_language_model,
    load_system1,
    load_tokenizer,
    name_newer_transformers,
    require_model,
    resolve_device,
    with_batch_dtype,
    with_training_dtype,
)
from llm2.config import EvaluateConfig, TrainConfig
from llm2.errors import UserError
from llm2.verifier.model import ProcessVerifier


def test_testbed_names_the_embedded_system1_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_local("testbed") and TESTBED.is_dir()
    require_model("testbed")
    tokenizer, system1 = load_tokenizer("testbed"), load_system1("testbed", torch.device("cpu"))
    assert tokenizer.name_or_path == system1.name_or_path == str(TESTBED)
    assert eos_ids_by_name("testbed", tokenizer) == eos_ids(system1, tokenizer) == [tokenizer.eos_token_id]
    for backbone in (load_backbone("testbed"), ProcessVerifier.from_system1("testbed").backbone):
        for name, weight in system1.model.state_dict().items():
            assert torch.equal(backbone.state_dict()[name], weight), name


@pytest.mark.parametrize("load", [require_model, load_tokenizer, load_backbone, ProcessVerifier.from_system1])
def test_a_missing_folder_is_refused_in_one_sentence(load):
    with pytest.raises(UserError, match="'./nowhere': expected a folder with config.json, found none") as refusal:
        load("./nowhere")
    assert "\n" not in str(refusal.value)


def test_weights_that_a_model_does_not_take_are_reported_and_those_that_it_lacks_are_an_error(
    tmp_path, caplog, monkeypatch
):
    logger = logging.getLogger("transformers.modeling_utils")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)
    name, weights = "model.norm.weight", load_file(TESTBED / "model.safetensors")
    shutil.copytree(TESTBED, tmp_path, dirs_exist_ok=True)

    def load(changed: dict[str, torch.Tensor]) -> list[str]:
        caplog.clear()
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        load_language_model(str(tmp_path))
        return [message for message in caplog.messages if "REPORT" in message]

    assert load(weights) == []
    (report,) = load({**weights, "a.stranger": torch.zeros(2)})
    assert "a.stranger" in report and "UNEXPECTED" in report
    with pytest.raises(UserError, match=f"do not hold '{name}', expected all of the model, found 1 missing"):
        load({key: value for key, value in weights.items() if key != name})
    with pytest.raises(UserError, match=rf"hold '{name}' of shape \[3\], expected \[160\] as config.json says"):
        load({**weights, name: torch.zeros(3)})
    assert caplog.messages == []


@pytest.mark.parametrize(
    "version, newer", [("5.24.0", False), ("5.9.1", False), ("5.25.0.dev0", True), ("6.0.0", True)]
)
def test_a_transformers_newer_than_the_tested_ones_is_named_once(monkeypatch, caplog, version, newer):
    monkeypatch.setattr("transformers.__version__", version)
    monkeypatch.setattr("llm2.common.loading.NEWEST_TESTED", "5.24.0")
    name_newer_transformers.cache_clear()
    load_tokenizer("testbed")
    load_tokenizer("testbed")
    expected = f"transformers {version} is newer than 5.24.0, the newest that this llm2 was tested with"
    assert [record.getMessage() for record in caplog.records if record.name == "llm2"] == [expected] * newer


@pytest.mark.parametrize("key", loading.BFLOAT16)
def test_batches_of_a_large_model_are_in_bfloat16_where_the_cpu_multiplies_in_it(monkeypatch, caplog, key):
    config = EvaluateConfig(model="testbed", task="testbed", output_dir="unused", device="cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {key: True})
    assert with_batch_dtype(config) is config, "the testbed is small"
    monkeypatch.setattr(loading, "LARGE", 1_000_000)
    with caplog.at_level(logging.INFO):
        assert with_batch_dtype(config) == replace(config, dtype="bfloat16")
    (message,) = caplog.messages
    assert message.startswith(f"dtype: bfloat16, for 1 million parameters on a CPU with {key};")
    elsewhere = {"engine": "vllm", "server": "http://localhost:1/v1"}
    for other in (replace(config, dtype="float32"), replace(config, **elsewhere)):
        assert with_batch_dtype(other) is other
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, key: False})
    assert with_batch_dtype(config) is config


@pytest.mark.parametrize("key", loading.BFLOAT16)
def test_a_large_model_trains_in_bfloat16_where_the_cpu_multiplies_in_it(monkeypatch, caplog, key):
    config = TrainConfig(model="testbed", train_file="unused", output_dir="unused", device="cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {key: True})
    assert with_training_dtype(config) == replace(config, bf16=False), "the testbed is small"
    monkeypatch.setattr(loading, "LARGE", 1_000_000)
    with caplog.at_level(logging.INFO):
        assert with_training_dtype(config) == replace(config, bf16=True)
    (message,) = caplog.messages
    assert message == f"bf16: true, for 1 million parameters on a CPU with {key}; bf16=false trains in float32"
    assert with_training_dtype(replace(config, bf16=False)).bf16 is False
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, key: False})
    assert with_training_dtype(config).bf16 is False
    assert with_training_dtype(replace(config, bf16=True)).bf16 is True


def test_devices_are_resolved_without_starting_cuda(monkeypatch):
    """Where it has started, vLLM's engine cannot be given other GPUs."""
    for name in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match=f"device {name} needs a CUDA GPU and torch sees none"):
            resolve_device(name)
    monkeypatch.setattr("torch.cuda.is_available", lambda: pytest.fail("initialises the driver"))
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [str(resolve_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")] == [
        "cuda",
        "cuda",
        "cuda:1",
        "cpu",
    ]
