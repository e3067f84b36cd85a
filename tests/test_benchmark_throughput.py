"""The throughput benchmark with the testbed's System 1 and an untrained verifier."""

import json

import pytest

from benchmarks.configs import ThroughputBenchmark
from benchmarks.throughput import measure
from llm2.verifier.model import ProcessVerifier


def test_ratios_are_to_batch_size_1_and_to_the_best_batch_size_of_generate(tmp_path):
    ProcessVerifier.from_system1("testbed").save_pretrained(tmp_path / "verifier")
    output = tmp_path / "throughput.json"
    limits = {"problems": 4, "problems_one_by_one": 2, "batch_size": 4, "max_new_tokens": 8, "rounds": 1}
    batch_sizes = {"generate_batch_sizes": (1, 4)}
    config = ThroughputBenchmark(
        benchmark="throughput",
        verifier=str(tmp_path / "verifier"),
        output=str(output),
        device="cpu",
        **limits,
        **batch_sizes,
    )
    table = measure(config)
    rows = json.loads(output.read_text())["rows"]
    one, four, plain, guided = (row["value"]["median"] for row in rows)
    for row, rate in zip(rows, (one, four, plain, guided), strict=True):
        assert row["name"] in table
        assert row["to_batch_1"] == pytest.approx(rate / one)
        assert row["to_best_batch"] == pytest.approx(rate / max(one, four))
