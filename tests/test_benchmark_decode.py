"""The decoding benchmark on a tiny Llama: its rows, and where their figures come from."""

import json

import pytest
import torch

from benchmarks import decode
from benchmarks.configs import DecodeBenchmark
from benchmarks.runner import BenchmarkCase
from llm2.decoding.decoder import Decoder, Guidance

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DecodeBenchmark:
    output = str(tmp_path_factory.mktemp("decode") / "decode.json")
    sizes = {"prompt_tokens": 8, "new_tokens": 40, "batch_sizes": (1, 2), "rounds": 1, "lora_r": 2}
    return DecodeBenchmark(benchmark="decode", output=output, device="cpu", **TINY, **sizes)


@pytest.mark.long
def test_the_file_has_every_row_and_ratios_are_to_generate(config):
    table = decode.measure(config)
    with open(config.output) as file:
        written = json.load(file)
    rows = written["rows"]
    names = [decode.GENERATE, "LLM2, no verifier", "LLM2, separate verifier at every token", decode.SEPARATE]
    names += ["LLM2, shared LoRA verifier", "LLM2, separate verifier of prefixes", "LLM2, prefix head"]
    assert [row["name"] for row in rows] == [*names, "the method as published, no cache", *names]
    assert all(row["ratio_to"] == decode.GENERATE for row in rows if row["name"] != decode.GENERATE)
    assert all(row["name"] in table for row in rows)
    for row in rows:
        if row["name"] == decode.SEPARATE:
            assert 0 < row["verifier_forwards"] < 1 < row["candidates"]
            assert 0.05 < row["choice_share"] < 0.5  # 0.2 is the target
        if "every token" in row["name"]:
            assert row["verifier_forwards"] == pytest.approx(1, abs=0.1)

    for counts in written["layout"].values():
        assert 0 <= counts["traced_host_reads"] - counts["host_reads"] <= 1 < counts["padding"] < 2
        assert 0.7 < counts["replayed"] <= 1


def test_the_uncached_loop_writes_what_the_decoder_writes(config):
    torch.manual_seed(0)  # the weights are random
    system1, separate, _ = decode.build(config, torch.device("cpu"), torch.float32)
    prompts = [[5, 6, 7, 8]]
    decode.scale_logits(system1, prompts, config)
    guidance = Guidance(verifier=separate, alpha=config.alpha, beta=20.0)
    ((completion,),) = Decoder(system1, guidance).decode(prompts, max_new_tokens=40, eos=[], trace=True)
    assert decode.naive(system1, guidance, prompts[0], 40) == completion.token_ids
    assert any(token.changed for token in completion.trace)


def test_the_bandwidth_share_counts_the_weights_read(config):
    system1, separate, _ = decode.build(config, torch.device("cpu"), torch.float32)
    total = sum(parameter.numel() for parameter in system1.parameters())
    assert decode.weight_bytes(system1) == 4 * (total - 256 * 32)
    cases = [
        BenchmarkCase(name=decode.GENERATE, run=float, unit="", batch_size=1, rates=[10.0]),
        BenchmarkCase(name=decode.SEPARATE, run=float, unit="", batch_size=1, rates=[10.0]),
    ]
    cases[1].extra["verifier_forwards"] = 0.5
    decode.add_bandwidth_share(cases, system1, separate, bandwidth=100.0)
    one, two = decode.weight_bytes(system1), decode.weight_bytes(separate.backbone)
    assert [case.extra["bandwidth_share"] for case in cases] == [0.1 * one, 0.1 * (one + two / 2)]


def test_memory_bandwidth_is_in_bytes_per_second():
    assert 1e8 < decode.memory_bandwidth(torch.device("cpu"), size=2**24, copies=3) < 1e13
