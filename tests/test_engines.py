"""Engines: what a rollout depends on, and how the server's client meets a server that falters."""

import json
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from llm2.common.loading import load_system1, load_tokenizer
from llm2.config import ExploreConfig
from llm2.errors import UserError
from llm2.exploration.engines import PositionQuery, Request, open_engine
from llm2.exploration.engines.vllm import plausible_from_logprobs


@pytest.fixture
def config(system1_folder) -> ExploreConfig:
    return ExploreConfig(
        model=system1_folder, output="unused", task="testbed", max_new_tokens=12, batch_size=4, device="cpu"
    )


REQUESTS = [
    Request([5, 6, 7, 8, 9], 4, [11], [1, 2, 3]),
    Request([5, 6, 7, 8, 9], 2, [12], [4]),
    Request([40, 41, 42], 3, [], [5, 6]),
]


def test_a_rollout_depends_on_its_prefix_and_seed_alone(config, system1_folder):
    tokenizer = load_tokenizer(system1_folder)
    together = open_engine(replace(config, batch_size=64), tokenizer).generate(REQUESTS)
    assert [len(rows) for rows in together] == [3, 1, 2]
    few = open_engine(config, tokenizer)
    for request, rows in zip(REQUESTS, together, strict=True):
        for seed, row in zip(request.seeds, rows, strict=True):
            assert few.generate([request._replace(seeds=[seed])]) == [[row]]


def test_greedy_rollouts_are_those_of_generate(config, system1_folder):
    engine = open_engine(replace(config, temperature=0.0), load_tokenizer(system1_folder))
    model = load_system1(system1_folder, torch.device("cpu"))
    for request, rows in zip(REQUESTS, engine.generate(REQUESTS), strict=True):
        ids = torch.tensor([request.prefix])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert all(row == written[0, ids.shape[1] :].tolist() for row in rows)


def test_a_stop_pattern_ends_a_row_once_its_text_holds_it(config, system1_folder):
    tokenizer = load_tokenizer(system1_folder)
    config = replace(config, max_new_tokens=40, batch_size=64)
    free = open_engine(config, tokenizer).generate(REQUESTS)
    letter = tokenizer.decode(free[0][0][5:6])  # stands in the first row by its 6th token: noticed after the 8th
    stopped = open_engine(replace(config, stop_pattern=re.escape(letter)), tokenizer).generate(REQUESTS)
    assert stopped[0][0] == free[0][0][:8]
    for request, rows, wholes in zip(REQUESTS, stopped, free, strict=True):
        for row, whole in zip(rows, wholes, strict=True):
            assert row == whole[: len(row)]
            assert len(row) == len(whole) or letter in tokenizer.decode([*request.own, *row])


def test_ids_beyond_the_models_vocabulary_are_told(config, system1_folder):
    engine = open_engine(config, load_tokenizer(system1_folder))
    with pytest.raises(UserError, match="writes the token 9999, and its model has a vocabulary of"):
        engine.plausible([PositionQuery([5, 9999, 6], 1, 3)])


def test_the_likeliest_tokens_are_cut_as_candidates_are(config):
    logprobs = [(3, -0.1), (5, -3.0), (4, -2.0), (9, -20.0)]  # exp(-2.0) is above a tenth of exp(-0.1), exp(-3.0) not
    assert [token for token, _ in plausible_from_logprobs(logprobs, replace(config, top_k=3))] == [3, 4]
    assert [token for token, _ in plausible_from_logprobs(logprobs, replace(config, top_k=1))] == [3]


class Faltering(BaseHTTPRequestHandler):
    """A completions server that echoes a prompt's last token n times, and fails as it is told to."""

    failures: list[int] = []  # HTTP statuses of the next answers; 0 closes the connection without one
    asked: list[dict] = []

    def do_GET(self):
        self.answer({"data": [{"id": "the-model"}]})

    def do_POST(self):
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(content)
        n = content.get("n", 1)
        self.answer({"choices": [{"index": i, "token_ids": [content["prompt"][-1], i]} for i in reversed(range(n))]})

    def answer(self, content: dict) -> None:
        status = self.failures.pop(0) if self.failures else 200
        if status == 0:
            return
        body = json.dumps(content).encode() if status == 200 else b'{"message": "too long a prompt"}'
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("llm2.exploration.engines.vllm_server.time.sleep", lambda seconds: None)
    Faltering.failures, Faltering.asked = [], []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Faltering)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1"
    http.shutdown()


@pytest.fixture
def client(config, system1_folder, server):
    return open_engine(replace(config, engine="vllm", server=server, top_k=5), load_tokenizer(system1_folder))


def test_a_server_is_asked_for_token_ids_and_answers_in_order(client):
    assert client.generate(REQUESTS) == [[[11, 0], [11, 1], [11, 2]], [[12, 0]], [[42, 0], [42, 1]]]
    asked = {tuple(content["prompt"]): content for content in Faltering.asked}
    assert asked[5, 6, 7, 8, 11]["n"] == 3 and asked[5, 6, 7, 8, 11]["seed"] == 1
    assert all(content["model"] == "the-model" and content["return_token_ids"] for content in Faltering.asked)


def test_a_server_that_falters_is_asked_again(client):
    Faltering.failures = [503, 0, 429, 500]
    assert client.generate(REQUESTS[:1]) == [[[11, 0], [11, 1], [11, 2]]]
    assert len(Faltering.asked) == 5


def test_a_server_that_refuses_is_quoted_and_not_asked_again(client):
    Faltering.failures = [400]
    with pytest.raises(UserError, match='refused a request: HTTP 400: .*"too long a prompt"'):
        client.generate(REQUESTS[:1])
    assert len(Faltering.asked) == 1


def test_a_server_that_stays_away_is_told(client):
    Faltering.failures = [503] * 50
    with pytest.raises(UserError, match="no answer from .* in 6 attempts, the last: HTTP 503"):
        client.generate(REQUESTS[:1])


def test_a_server_that_is_not_there_is_told(config, system1_folder, monkeypatch):
    monkeypatch.setattr("llm2.exploration.engines.vllm_server.time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match="no answer from http://127.0.0.1:9/v1/models .*is `vllm serve` up"):
        open_engine(
            replace(config, engine="vllm", server="http://127.0.0.1:9/v1", top_k=5), load_tokenizer(system1_folder)
        )


def test_vllm_that_is_not_installed_is_told(config, system1_folder):
    with pytest.raises(UserError, match="engine: vllm wants vLLM in this Python"):
        open_engine(replace(config, engine="vllm", top_k=5), load_tokenizer(system1_folder))
