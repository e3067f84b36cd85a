"""What the benchmarks of exploration count and compare, on numbers worked out by hand."""

import pytest
import torch

from llm2.benchmarks.configs import LabelsBenchmark, RolloutBenchmark
from llm2.benchmarks.labels import compare, exhaust
from llm2.benchmarks.rollouts import count, generate
from llm2.common.loading import load_tokenizer
from llm2.config import ExploreConfig
from llm2.exploration.engines import Request, open_engine
from llm2.exploration.explore import Explorer
from llm2.tasks import load_task

SYSTEM1 = "llm2/testbed/system1"


def test_labels_are_compared_beyond_the_margin_only():
    lower = {
        ("a", 1, 1): 0.8,
        ("a", 1, 2): 0.5,
        ("a", 1, 3): 0.1,
        ("b", 2, 1): -0.6,
        ("b", 2, 2): 0.4,
        ("b", 2, 3): -0.5,
    }
    verdicts = dict(zip(lower, ("negative", "equal", "negative", "equal", "undecided", "negative"), strict=True))
    agreement, decided, found, worse = (row["value"]["median"] for row in compare(verdicts, lower, 0.3))
    assert agreement == pytest.approx(2 / 4)  # of 0.8, 0.5, -0.6, -0.5 the first and the third
    assert decided == pytest.approx(4 / 5)  # all beyond the margin but 0.4
    assert found == pytest.approx(1 / 3)  # of 0.8, 0.5, 0.4 the first
    assert worse == pytest.approx(2 / 3)  # of 0.8, 0.1, -0.5 the first two


@pytest.fixture(scope="module")
def explorer() -> Explorer:
    config = ExploreConfig(
        model=SYSTEM1, output="unused", task="testbed", limit=1, max_new_tokens=100, batch_size=64, device="cpu"
    )
    tokenizer = load_tokenizer(SYSTEM1)
    return Explorer(config, open_engine(config, tokenizer), tokenizer, load_task("testbed"))


def test_the_reference_rolls_every_token_out_equally_often(explorer):
    problems = explorer.task.problems("train", 1)
    (entry,) = exhaust(explorer, problems, LabelsBenchmark(benchmark="labels", reference_rollouts=4))
    (state,) = explorer.start_problems(problems)
    assert [(fork[0], tuple(token for token, _ in fork[1:])) for fork in entry["forks"]] == [
        (fork.position, fork.tokens) for fork in state.test.forks
    ]
    assert all(quality in (0, 0.25, 0.5, 0.75, 1) for fork in entry["forks"] for _, quality in fork[1:])
    assert entry["tokens"] > 4 * sum(len(fork.tokens) for fork in state.test.forks)


def test_generate_is_credited_with_the_tokens_up_to_the_end_of_each_row(explorer):
    """Where only one continuation is likely, both write the same number of tokens."""
    engine = explorer.engine
    (state,) = explorer.start_problems(explorer.task.problems("train", 1))
    requests = [Request(state.solution.ids, state.solution.end - back, [], [1, 2]) for back in (1, 2, 4)]
    config = RolloutBenchmark(benchmark="rollouts", batch_size=4, device="cpu")
    torch.manual_seed(0)
    written = generate(engine.model, engine.eos, engine.tokenizer.pad_token_id, requests, config)
    assert written == count(engine.generate(requests)) == 2 * (1 + 2 + 4)
