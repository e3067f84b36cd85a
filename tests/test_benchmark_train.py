"""The train benchmark: its variants do the same work, and its file has all rows."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import train as benchmark
from benchmarks.configs import TrainBenchmark


@pytest.fixture
def config(tmp_path) -> TrainBenchmark:
    return TrainBenchmark(
        benchmark="train",
        output=str(tmp_path / "train.json"),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        solutions=(1, 2),
        tokens=20,
        pairs=4,
        lines=40,
        rounds=2,
        device="cpu",
    )


@pytest.mark.parametrize("plain_tokens", [10_000, 130])  # 130: three pairs a forward, and the last two
def test_packed_and_plain_have_the_same_gradients(config, monkeypatch, plain_tokens):
    monkeypatch.setattr(benchmark, "PLAIN_TOKENS", plain_tokens)
    step = benchmark.make_step(config, 2, torch.device("cpu"))
    gradients = []

    def keep(model, loss):
        loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        model.zero_grad()

    monkeypatch.setattr(benchmark.TrainStep, "finish", staticmethod(keep))
    step.run_packed()
    step.run_plain()
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, atol=1e-6, rtol=0, msg=name)


def test_the_file_has_every_row(config):
    table = benchmark.measure(config)
    written = json.loads(Path(config.output).read_text())
    rows = {(row["name"], row["batch_size"]): row for row in written["rows"]}
    assert rows["packed, by pairs", 1]["ratio_to"] == "plain" and ("plain", 2) not in rows
    assert rows["packed, by tokens", 2]["ratio_to"] == "bare backbone"
    assert rows["check 40 lines", 1]["unit"] == "lines/s" and rows["check 10 lines", 1]["value"]["median"] > 0
    assert rows["plain", 1]["peak_mib"] > 2 * rows["packed, by pairs", 1]["peak_mib"] > 0
    assert written["runs"] == 2 and "packed, by pairs" in table
