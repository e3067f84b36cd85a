"""How benchmarks measure: cases in turn, ratios within a round; and every key of theirs is explained."""

import json

import pytest

from benchmarks.configs import BENCHMARKS, RolloutBenchmark
from benchmarks.runner import BenchmarkCase, markdown_table, result_rows, run_interleaved
from llm2.common.config_file import help_text


def config(folder) -> RolloutBenchmark:
    return RolloutBenchmark(benchmark="rollouts", output=str(folder / "rows.json"), rounds=2)


def test_all_cases_run_in_turn_in_each_round_after_a_warm_up(tmp_path):
    order = []

    def case(name: str) -> BenchmarkCase:
        return BenchmarkCase(name, lambda: order.append(name) or 1.0, "runs/s", 1)

    cases = [case("a"), case("b")]
    run_interleaved(cases, config(tmp_path), "test")
    assert order == ["a", "b"] * 3 and [len(case.rates) for case in cases] == [2, 2]


def test_each_row_is_written_and_printed_as_soon_as_it_is_measured(tmp_path, capsys):
    """Where the second case ends the benchmark in its last round, the file has the first with two rounds."""
    runs = []

    def fails() -> float:
        runs.append(1)
        if len(runs) == 3:
            raise RuntimeError("out of memory")
        return 1.0

    cases = [BenchmarkCase("a", lambda: 1.0, "runs/s", 1), BenchmarkCase("b", fails, "runs/s", 1, ratio_to="a")]
    earlier = [BenchmarkCase("of batch 1", float, "runs/s", 4, rates=[5.0, 5.0])]
    with pytest.raises(RuntimeError, match="out of memory"):
        run_interleaved(cases, config(tmp_path), "test", earlier)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["of batch 1", "a", "b"]
    assert rows[1]["value"]["min"] < rows[1]["value"]["max"] and rows[2]["value"]["min"] == rows[2]["value"]["max"]
    (printed,) = capsys.readouterr().out.splitlines()
    assert printed.startswith("| a | 1 |")


def test_a_ratio_is_the_median_of_ratios_within_a_round():
    base = BenchmarkCase("base", float, "tokens/s", 4, rates=[10.0, 10.0, 40.0])
    fast = BenchmarkCase("fast", float, "tokens/s", 4, ratio_to="base", extra={"share": 0.25}, rates=[10.0, 30.0, 20.0])
    rows = result_rows([base, fast])
    assert rows[0]["ratio"] is None and rows[1]["value"] == {"median": 20, "min": 10, "max": 30}
    assert rows[1]["ratio"] == {"median": 1, "min": 0.5, "max": 3}  # the ratio of the medians would be 2
    line = "| fast | 4 | 20 [10, 30] | tokens/s | 1.00 [0.50, 3.00] | base |  | 0.25 |"
    assert markdown_table(rows, ["share"]).splitlines()[-1] == line


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_key_has_a_sentence(name):
    lines = help_text(BENCHMARKS[name]).splitlines()
    assert len(lines) == 2 * len(BENCHMARKS[name].__dataclass_fields__)
    assert all(line.startswith("      ") and line.endswith(".") for line in lines[1::2])
