"""Engines: rollouts depend on prompt and seed alone; requests to vLLM; retries at a failing server."""

import json
import math
import re
import sys
import threading
from collections import deque
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

from llm2.common.loading import load_system1, load_tokenizer
from llm2.config import RolloutConfig
from llm2.errors import UserError
from llm2.exploration.engines import PositionQuery, Request, open_engine
from llm2.exploration.engines.vllm import plausible_from_logprobs
from llm2.vllm.client import ServerBackend


@pytest.fixture
def config(system1_folder) -> RolloutConfig:
    return RolloutConfig(model=system1_folder, max_new_tokens=12, batch_size=4, device="cpu")


REQUESTS = [
    Request([5, 6, 7, 8, 9], 4, [11], [1, 2, 3]),
    Request([5, 6, 7, 8, 9], 2, [12], [4]),
    Request([40, 41, 42], 3, [], [5, 6]),
]


def test_a_rollout_depends_on_its_prompt_and_seed_alone(config, system1_folder):
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
        ids = torch.tensor([request.prompt])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert all(row == written[0, ids.shape[1] :].tolist() for row in rows)


def test_a_stop_pattern_ends_a_row_once_its_text_holds_it(config, system1_folder):
    tokenizer = load_tokenizer(system1_folder)
    config = replace(config, max_new_tokens=40, batch_size=64)
    unstopped = open_engine(config, tokenizer).generate(REQUESTS)
    letter = tokenizer.decode(unstopped[0][0][5:6])  # the first row's 6th token: noticed after the 8th
    stopped = open_engine(replace(config, stop_pattern=re.escape(letter)), tokenizer).generate(REQUESTS)
    assert stopped[0][0] == unstopped[0][0][:8]
    for request, rows, whole_rows in zip(REQUESTS, stopped, unstopped, strict=True):
        for row, whole in zip(rows, whole_rows, strict=True):
            assert row == whole[: len(row)]
            assert len(row) == len(whole) or letter in tokenizer.decode([*request.token_ids, *row])


def test_a_stop_pattern_does_not_cut_an_own_solution(config, system1_folder):
    """What is kept would end amid a sentence, with an end of sequence as its last gold token."""
    config, tokenizer = replace(config, max_new_tokens=40), load_tokenizer(system1_folder)
    whole = [Request([40, 41, 42], 3, (), [5, 6])]  # as `sample_solutions` asks
    stopping = open_engine(replace(config, stop_pattern="."), tokenizer)
    assert stopping.generate(whole) == open_engine(config, tokenizer).generate(whole)
    assert max(map(len, stopping.generate([Request([40, 41, 42], 2, (42,), [5, 6])])[0])) <= 8


def test_each_request_is_reported_once_with_its_continuations(config, system1_folder):
    finished = {}
    engine = open_engine(config, load_tokenizer(system1_folder))
    results = engine.generate(REQUESTS)
    for index, continuations in engine.stream(deque(REQUESTS)):
        assert index not in finished
        finished[index] = continuations
    assert [finished[index] for index in range(len(REQUESTS))] == results


def test_ids_beyond_the_models_vocabulary_are_an_error(config, system1_folder):
    engine = open_engine(config, load_tokenizer(system1_folder))
    with pytest.raises(UserError, match="writes the token 9999, and its model has a vocabulary of"):
        engine.plausible([PositionQuery([5, 9999, 6], 1, 3)])


LOGPROBS = [(3, -0.1), (5, -3.0), (4, -2.0), (9, -20.0)]  # exp(-2.0) is above a tenth of exp(-0.1), exp(-3.0) not


def test_the_plausible_set_of_logprobs_is_cut_at_alpha_and_top_k(config):
    assert plausible_from_logprobs(LOGPROBS, replace(config, top_k=3)) == [(3, math.exp(-0.1)), (4, math.exp(-2.0))]
    assert plausible_from_logprobs(LOGPROBS, replace(config, top_k=1)) == [(3, math.exp(-0.1))]
    tied = [(8, -1.0), (7, -1.0), (6, -1.5), (9, -1.0)]
    for top_k, expected in ((2, [9, 8]), (4, [9, 8, 7, 6])):
        assert [token for token, _ in plausible_from_logprobs(tied, replace(config, top_k=top_k))] == expected
    assert [token for token, _ in plausible_from_logprobs(tied, replace(config, top_k=4, alpha=1.0))] == [9, 8, 7]


class FakeLLM:
    """vLLM's `LLM` and its engine: the same log probabilities everywhere; continues a prompt with its last token, seed
    and index, and finishes the last request first."""

    def __init__(self, **options) -> None:
        self.options, self.llm_engine, self.queue = options, self, []

    def enqueue(self, prompts, params, use_tqdm) -> list[str]:
        self.queue = [(f"{7 + i}", prompt["prompt_token_ids"], params[i]) for i, prompt in enumerate(prompts)]
        return [f"{name}-random" for name, _, _ in self.queue]

    def has_unfinished_requests(self) -> bool:
        return bool(self.queue)

    def step(self) -> list:
        name, ids, options = self.queue.pop()
        logprobs = {token: SimpleNamespace(logprob=value) for token, value in LOGPROBS}
        rows = [[ids[-1], options.get("seed"), k] for k in range(options.get("n", 1))]
        outputs = [SimpleNamespace(index=k, token_ids=tuple(row), logprobs=None) for k, row in enumerate(rows)]
        prompt_logprobs = [None] + [logprobs] * (len(ids) - 1)
        fields = {"request_id": name, "finished": True, "outputs": outputs, "prompt_logprobs": prompt_logprobs}
        return [SimpleNamespace(finished=False), SimpleNamespace(**fields)]


def test_vllm_in_process_gets_prompts_and_seeds_and_answers_in_order(config, system1_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=FakeLLM, SamplingParams=dict))
    engine = open_engine(replace(config, engine="vllm", top_k=3), load_tokenizer(system1_folder))
    options = engine.backend.llm.options
    assert options["max_logprobs"] == 3 and options["dtype"] == "float32" and "additional_config" not in options
    requests = [*REQUESTS[:2], REQUESTS[2]._replace(seeds=[-1])]
    finished = dict(engine.stream(deque(requests)))
    results = engine.generate(requests)
    assert results == [[[11, 1, 0], [11, 1, 1], [11, 1, 2]], [[12, 4, 0]], [[42, 2**31 - 1, 0]]]
    assert [finished[index] for index in range(3)] == results and list(finished) == [2, 1, 0]
    candidates = [(3, math.exp(-0.1)), (4, math.exp(-2.0))]
    queries = [PositionQuery([5, 6, 7, 8], 1, 3), PositionQuery([5, 6], 1, 2)]
    assert engine.plausible(queries) == [[candidates] * 2, [candidates]]


LOCK = threading.Lock()


class FalteringServer(BaseHTTPRequestHandler):
    """A completions server that echoes a prompt's last token n times, and fails as `failures` says."""

    failures: list[int] = []  # HTTP statuses of the next answers; 0 closes the connection without one
    received: list[dict] = []

    guiding: dict | None = None  # what it says of guidance; None: it does not know the path
    guides = True  # whether it guides what it is asked to

    def do_GET(self):
        if self.path == "/v1/llm2" and self.guiding is None:
            return self.answer({}, 404)
        self.answer(self.guiding if self.path == "/v1/llm2" else {"data": [{"id": "the-model"}]})

    def do_POST(self):
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.received.append(content)
        n = content.get("n", 1)
        if self.guides and "vllm_xargs" in content:
            with LOCK:
                beta = f"{content['vllm_xargs']['llm2_beta']:g}"
                guided = self.guiding["guided_tokens"]
                guided[beta] = guided.get(beta, 0) + 2 * n
        self.answer({"choices": [{"index": i, "token_ids": [content["prompt"][-1], i]} for i in reversed(range(n))]})

    def answer(self, content: dict, status: int = 200) -> None:
        status = self.failures.pop(0) if self.failures else status
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
    monkeypatch.setattr("llm2.vllm.client.time.sleep", lambda seconds: None)
    FalteringServer.failures, FalteringServer.received = [], []
    FalteringServer.guiding, FalteringServer.guides = None, True
    http = ThreadingHTTPServer(("127.0.0.1", 0), FalteringServer)
    threading.Thread(target=http.serve_forever, args=[0.01], daemon=True).start()  # looks for a shutdown that often
    yield f"http://127.0.0.1:{http.server_port}/v1"
    http.shutdown()


@pytest.fixture
def client(config, system1_folder, server):
    return open_engine(replace(config, engine="vllm", server=server, top_k=5), load_tokenizer(system1_folder))


def test_a_server_gets_token_ids_and_answers_in_order(client):
    assert client.generate(REQUESTS) == [[[11, 0], [11, 1], [11, 2]], [[12, 0]], [[42, 0], [42, 1]]]
    received = {tuple(content["prompt"]): content for content in FalteringServer.received}
    assert received[5, 6, 7, 8, 11]["n"] == 3 and received[5, 6, 7, 8, 11]["seed"] == 1
    assert all(content["model"] == "the-model" and content["return_token_ids"] for content in FalteringServer.received)


def test_a_request_leaves_nothing_to_the_models_generation_config(client):
    client.generate(REQUESTS)
    wanted = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    for content in FalteringServer.received:
        assert {key: content[key] for key in wanted} == wanted and content.keys() >= {"temperature", "top_p"}


def test_after_an_error_no_further_request_is_sent(server, system1_folder):
    FalteringServer.failures = [200, 400]  # of /models, and of the first request
    backend = ServerBackend(server, system1_folder, 1, guides=False)
    with pytest.raises(UserError, match="HTTP 400"):
        list(backend.stream([[5, 6]] * 500, [{"n": 1}] * 500))
    backend.pool.shutdown()  # as Python does before it exits
    assert len(FalteringServer.received) < 500


PROMPTS = [[5, 6], [5, 7], [5, 8]]
GUIDED = [{"n": 2, "extra_args": {"llm2_beta": beta}} for beta in (0.5, 0.25)] + [{"n": 1}]


def test_a_server_that_cannot_say_what_it_guides_is_refused(server, system1_folder):
    with pytest.raises(UserError, match="does not say what it guides .*expected one that `llm2 serve` started"):
        ServerBackend(server, system1_folder, 4, guides=True)
    FalteringServer.guiding = {"unknown": 1}
    with pytest.raises(UserError, match="expected counts of llm2"):
        ServerBackend(server, system1_folder, 4, guides=True)


@pytest.mark.parametrize("engines", [1, 2])
def test_answers_that_were_not_guided_are_told(server, system1_folder, engines):
    FalteringServer.guiding = {"started": 1.5, "engines": engines, "guided_tokens": {"0.5": 7}}
    backend = ServerBackend(server, system1_folder, 4, guides=True)
    assert len(list(backend.stream(PROMPTS, GUIDED))) == 3
    assert FalteringServer.guiding["guided_tokens"] == {"0.5": 11, "0.25": 4}
    assert len(list(backend.stream(PROMPTS[2:], GUIDED[2:]))) == 1, "plain requests need no proof"
    FalteringServer.guides = False
    with pytest.raises(UserError, match=r"guided 0 of 4 tokens that it wrote with llm2_beta=0.2?5; expected all"):
        list(backend.stream(PROMPTS, GUIDED))


def test_a_server_that_was_restarted_must_guide_some(server, system1_folder):
    FalteringServer.guiding = {"started": 1.5, "engines": 1, "guided_tokens": {"0.5": 700, "0.25": 700}}
    backend = ServerBackend(server, system1_folder, 4, guides=True)
    answers = backend.stream(PROMPTS, GUIDED)
    next(answers)
    FalteringServer.guiding = {"started": 2.5, "engines": 1, "guided_tokens": {"0.5": 1, "0.25": 1}}
    assert len(list(answers)) == 2


def test_a_request_that_fails_is_sent_again(client):
    FalteringServer.failures = [503, 0, 429, 500]
    assert client.generate(REQUESTS[:1]) == [[[11, 0], [11, 1], [11, 2]]]
    assert len(FalteringServer.received) == 5


def test_a_server_that_refuses_is_quoted_and_gets_no_retry(client):
    FalteringServer.failures = [400]
    with pytest.raises(UserError, match='refused a request: HTTP 400: .*"too long a prompt"'):
        client.generate(REQUESTS[:1])
    assert len(FalteringServer.received) == 1


def test_a_server_that_keeps_failing_is_an_error(client):
    FalteringServer.failures = [503] * 50
    with pytest.raises(UserError, match="no answer from .* in 6 attempts, the last: HTTP 503"):
        client.generate(REQUESTS[:1])


def test_a_server_that_does_not_listen_is_an_error(config, system1_folder, monkeypatch):
    monkeypatch.setattr("llm2.vllm.client.time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match="no answer from http://127.0.0.1:9/v1/models .*is `vllm serve` up"):
        open_engine(
            replace(config, engine="vllm", server="http://127.0.0.1:9/v1", top_k=5), load_tokenizer(system1_folder)
        )


def test_a_missing_vllm_is_an_error(config, system1_folder):
    with pytest.raises(UserError, match="engine: vllm needs vLLM in this Python"):
        open_engine(replace(config, engine="vllm", top_k=5), load_tokenizer(system1_folder))
