"""The benchmarks of exploration: their counts and comparisons, against numbers derived by hand."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import labels
from benchmarks.configs import LabelsBenchmark, RolloutBenchmark
from benchmarks.labels import compare, reference_entries
from benchmarks.rollouts import GENERATE, generate, measure, num_tokens
from llm2.common import loading
from llm2.common.loading import load_tokenizer
from llm2.config import ExploreConfig
from llm2.exploration.engines import Request, open_engine
from llm2.exploration.explore import Explorer
from llm2.tasks import load_task


def test_labels_are_compared_beyond_the_margin_only():
    gaps = {
        ("a", 1, 1): 0.8,
        ("a", 1, 2): 0.5,
        ("a", 1, 3): 0.1,
        ("b", 2, 1): -0.6,
        ("b", 2, 2): 0.4,
        ("b", 2, 3): -0.5,
    }
    verdicts = dict(zip(gaps, ("negative", "equal", "negative", "equal", "undecided", "negative"), strict=True))
    agreement, decided, found, worse = (row["value"]["median"] for row in compare(verdicts, gaps, 0.3))
    assert agreement == pytest.approx(2 / 4)  # of 0.8, 0.5, -0.6, -0.5 the first and the third
    assert decided == pytest.approx(4 / 5)  # all beyond the margin but 0.4
    assert found == pytest.approx(1 / 3)  # of 0.8, 0.5, 0.4 the first
    assert worse == pytest.approx(2 / 3)  # of 0.8, 0.1, -0.5 the first two
    skipped = {pair: verdict for pair, verdict in verdicts.items() if verdict != "undecided"}
    assert compare(skipped, gaps, 0.3) == compare(verdicts, gaps, 0.3)


@pytest.mark.long
def test_a_second_measurement_reuses_the_exploration_and_the_reference(tmp_path, monkeypatch):
    """Also where `auto` is bfloat16, which the exploration's report then names."""
    monkeypatch.setattr(loading, "LARGE", 0)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    output = tmp_path / "labels.json"
    config = LabelsBenchmark(benchmark="labels", output=str(output), problems=1, reference_rollouts=1)
    table = labels.measure(config)
    monkeypatch.setattr(labels, "explore", None)
    monkeypatch.setattr(labels, "reference_entries", None)
    assert labels.measure(config) == table
    assert [row["unit"] for row in json.loads(output.read_text())["rows"]] == ["share"] * 5


@pytest.mark.long
def test_labels_along_own_solutions(tmp_path, monkeypatch):
    """The reference follows the solutions that were explored, without the forks that a problem's solutions share."""
    explore = tmp_path / "explore.yaml"
    explore.write_text(
        "model: testbed\ntask: testbed\nsolutions: own\nmax_solutions: 2\nsolution_samples: 6\nskip_hopeless: true\n"
        "max_new_tokens: 100\nmax_rollouts: 4\nmin_rollouts: 2\nbatch_size: 64\ndevice: cpu\noutput: unused\n"
    )
    config = LabelsBenchmark(
        benchmark="labels", output=str(tmp_path / "l.json"), explore=str(explore), problems=2, reference_rollouts=2
    )
    compared = []
    monkeypatch.setattr(labels, "compare", lambda *arguments: compared.append(arguments) or compare(*arguments))
    labels.measure(config)
    ((verdicts, gaps, _),) = compared
    assert len(verdicts) > 5 and {name.partition("/")[2] for name, *_ in gaps} == {"0", "1"}
    assert verdicts.keys() < gaps.keys()  # some forks are skipped

    decided = replace(config, decided_only=True, output=str(tmp_path / "decided.json"))
    table = labels.measure(decided)
    _, (verdicts, gaps, _) = compared
    assert gaps.keys() == {pair for pair, verdict in verdicts.items() if verdict != "undecided"} < verdicts.keys()
    assert "label agreement" in table and "found, of" not in table and "generated tokens" not in table


@pytest.fixture(scope="module")
def explorer() -> Explorer:
    config = ExploreConfig(
        model="testbed", output="unused", task="testbed", limit=1, max_new_tokens=100, batch_size=64, device="cpu"
    )
    tokenizer = load_tokenizer("testbed")
    return Explorer(config, open_engine(config, tokenizer), tokenizer, load_task("testbed"))


def test_the_reference_has_equally_many_rollouts_of_every_token(explorer):
    problems = explorer.task.problems("train", 1)
    (entry,) = reference_entries(explorer, problems, LabelsBenchmark(benchmark="labels", reference_rollouts=4))
    (state,) = explorer.start_problems(problems)
    assert [(fork[0], tuple(token for token, _ in fork[1:])) for fork in entry["forks"]] == [
        (fork.position, fork.tokens) for fork in state.test.forks
    ]
    assert all(quality in (0, 0.25, 0.5, 0.75, 1) for fork in entry["forks"] for _, quality in fork[1:])
    assert entry["tokens"] > 4 * sum(len(fork.tokens) for fork in state.test.forks)


def test_the_reference_of_decided_tokens_is_a_part_of_the_whole(explorer):
    problems = explorer.task.problems("train", 1)
    config = LabelsBenchmark(benchmark="labels", reference_rollouts=2)
    (whole,) = reference_entries(explorer, problems, config)
    position, gold, *_, last = max(whole["forks"], key=len)
    (part,) = reference_entries(explorer, problems, config, {(problems[0].id, position, last[0]), ("other", 0, 0)})
    assert part["forks"] == [[position, gold, last]] and 0 < part["tokens"] < whole["tokens"]


def test_tokens_of_generate_count_up_to_the_end_of_each_rollout(explorer):
    """Where only one continuation is likely, both engines generate the same number of tokens."""
    engine = explorer.engine
    problems = explorer.task.problems("train", 1)
    (state,) = explorer.start_problems(problems)
    requests = [Request(state.solution.ids, state.solution.end - back, [], [1, 2]) for back in (1, 2, 4)]
    config = RolloutBenchmark(benchmark="rollouts", batch_size=4, device="cpu")
    torch.manual_seed(0)
    tokens = generate(engine.model, engine.eos, engine.tokenizer.pad_token_id, requests, config)
    assert tokens == num_tokens(engine.generate(requests)) == 2 * (1 + 2 + 4)


def test_the_file_has_both_engines_and_the_number_of_prefixes(tmp_path, explorer):
    """The prefixes are the plausible tokens of all forks, but for those that end the answer."""
    output = tmp_path / "rollouts.json"
    limits = {"problems": 1, "rollouts": 2, "max_new_tokens": 4, "rounds": 1}
    table = measure(RolloutBenchmark(benchmark="rollouts", output=str(output), device="cpu", **limits))
    problems = explorer.task.problems("train", 1)
    (state,) = explorer.start_problems(problems)
    tokens = [token for fork in state.test.forks for token in fork.tokens if token not in explorer.engine.eos]
    written = json.loads(output.read_text())
    assert written["prefixes"] == len(tokens) and f"{len(tokens)} prefixes" in table
    assert [(row["name"], row["ratio_to"]) for row in written["rows"]] == [
        (GENERATE, None),
        ("LLM2 rollouts", GENERATE),
    ]
