"""Guidance inside vLLM against our own decoder: the same tokens, in process and served. `bash scripts/test_vllm.sh`.

LLM2_VERIFIER and LLM2_PREFIX_HEAD name trained verifiers of the testbed; LLM2_PROBLEMS (300) and LLM2_SOAK (5,000) set
the numbers of problems and of the soak's requests.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llm2.common.chat import encode_chats
from llm2.common.loading import eos_ids_by_name, load_tokenizer
from llm2.config import EvaluateConfig, GuidanceConfig, Mode, TrainConfig
from llm2.decoding.decoder import Decoder
from llm2.decoding.llm2 import LLM2
from llm2.decoding.processing import load_processor, logits_fn
from llm2.errors import UserError
from llm2.evaluation.evaluate import evaluate
from llm2.tasks import load_task
from llm2.verifier.model import ProcessVerifier
from llm2.verifier.train import train
from llm2.vllm.client import ServerBackend
from llm2.vllm.engine import InProcessBackend, engine_options
from llm2.vllm.proof import SERVER_OPTIONS
from llm2.vllm.serve import command_line
from llm2.vllm.settings import guidance_args

PROBLEMS, SOAK = int(os.environ.get("LLM2_PROBLEMS", 300)), int(os.environ.get("LLM2_SOAK", 5_000))
GUIDANCE = GuidanceConfig(alpha=0.1, beta=0.5)
ARITHMETIC = "llm2.decoding.arithmetic:Arithmetic"


def config(**changes) -> EvaluateConfig:
    fields = {"model": "testbed", "task": "testbed", "output_dir": "unused", "device": "cpu", "max_new_tokens": 200}
    return EvaluateConfig(**{**fields, "batch_size": 64, "max_model_len": 512, **changes})


def trained(variable: str, folder: Path, **changes) -> str:
    if variable not in os.environ:
        files = {"train_file": "dataset/testbed.jsonl", "output_dir": str(folder), "per_device_train_batch_size": 32}
        sizes = {"global_batch_size": 32, "num_train_epochs": 1.0, "learning_rate": 3e-4}
        train(TrainConfig(model="testbed", device="cpu", **files, **{**sizes, **changes}))
    return os.environ.get(variable, str(folder))


@pytest.fixture(scope="module")
def verifier(tmp_path_factory) -> str:
    return trained("LLM2_VERIFIER", tmp_path_factory.mktemp("verifier"))


@pytest.fixture(scope="module")
def prefix_head(tmp_path_factory) -> str:
    settings = {"kind": "bilinear", "learning_rate": 1e-2, "num_train_epochs": 6.0}
    return trained("LLM2_PREFIX_HEAD", tmp_path_factory.mktemp("head"), **settings)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    task = load_task("testbed")
    conversations = [task.prompt(problem) for problem in task.problems("validation", PROBLEMS)]
    return encode_chats(load_tokenizer("testbed"), conversations, generation_prompt=True)


@pytest.fixture(scope="module")
def eos() -> list[int]:
    return eos_ids_by_name("testbed", load_tokenizer("testbed"))


def by_decoder(
    verifier: str, prompts, eos, guided: bool, model: str = "testbed", max_new_tokens: int = 200, processor=None
) -> list[list[int]]:
    llm2 = LLM2.from_pretrained(model, verifier, device="cpu", **GUIDANCE.guidance_kwargs())
    decoder = Decoder(llm2.system1, llm2.guidance if guided else None)
    process = logits_fn(load_processor(processor, llm2.tokenizer), prompts.__getitem__)
    options = {"max_new_tokens": max_new_tokens, "eos": eos, "process_logits": process}
    return [row.token_ids for (row,) in decoder.decode(prompts, **options)]


@pytest.fixture(scope="module")
def guided(verifier, prompts, eos) -> list[list[int]]:
    return by_decoder(verifier, prompts, eos, guided=True)


@pytest.fixture(scope="module")
def plain(verifier, prompts, eos) -> list[list[int]]:
    return by_decoder(verifier, prompts, eos, guided=False)


def request(eos, guidance: GuidanceConfig | None = GUIDANCE, **options) -> dict:
    fixed = {"max_tokens": 200, "temperature": 0.0, "stop_token_ids": eos}
    return {**fixed, "extra_args": guidance_args(guidance), **options}


def write(backend, prompts, requests) -> list:
    answers = dict(backend.stream(prompts, requests))
    return [answers[index].samples for index in range(len(prompts))]


def expect_both(backend, prompts, eos, guided, plain, **options) -> None:
    """Guided and plain requests in one batch."""
    requests = [request(eos, **options), request(eos, None, **options)] * len(prompts)
    written = write(backend, [prompt for prompt in prompts for _ in range(2)], requests)
    assert [row for (row,) in written[0::2]] == guided
    assert [row for (row,) in written[1::2]] == plain
    assert guided != plain


def steps(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def engine(verifier: str, **options) -> InProcessBackend:
    return InProcessBackend(config(), verifier, 2, max_num_seqs=64, **options)


@pytest.fixture
def log(tmp_path, monkeypatch) -> Path:
    """A line for each step of every rank."""
    monkeypatch.setenv("LLM2_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def test_in_process_equals_the_decoder_mixed_with_plain_requests_and_after_aborts(
    verifier, prompts, eos, guided, plain, log
):
    backend = engine(verifier)
    expect_both(backend, prompts, eos, guided, plain)
    stream = backend.stream(prompts, [request(eos)] * len(prompts))
    next(stream)  # the others are under way
    core = backend.llm.llm_engine
    core.abort_request(list(core.output_processor.external_req_ids), internal=False)
    stream.close()
    while core.has_unfinished_requests():
        core.step()
    expect_both(backend, prompts[:40], eos, guided[:40], plain[:40])

    samples = {"temperature": 1.0, "n": 4, "seed": 7}
    first, again = (write(backend, prompts[:20], [request(eos, **samples)] * 20) for _ in range(2))
    assert first == again and any(len(set(map(tuple, rows))) > 1 for rows in first)
    other = write(backend, prompts[:20], [request(eos, **samples | {"seed": 99})] * 20)
    assert other != first
    for wrong in ({"llm2_beta": -1.0}, {"llm2_beta": 0.5, "llm2_alhpa": 0.1}, {"llm2_alpha": 2.0}):
        with pytest.raises(Exception, match="request: .*llm2_"):  # vLLM's own class
            write(backend, prompts[:1], [request(eos) | {"extra_args": wrong}])
    with pytest.raises(Exception, match="repetition_penalty: found 1.3 with llm2_beta"):
        write(backend, prompts[:1], [request(eos, repetition_penalty=1.3)])
    write(backend, prompts[:1], [request(eos, None)])  # the step in which the last ones are seen to have left
    assert steps(log)[-1]["free_slots"] == 64
    backend.close()


def test_small_chunks_and_few_blocks_change_nothing(verifier, prompts, eos, guided, plain):
    small = {"enable_chunked_prefill": True, "max_num_batched_tokens": 64, "block_size": 32}
    backend = engine(verifier, **small, num_gpu_blocks_override=96, disable_log_stats=False)
    expect_both(backend, prompts, eos, guided, plain)
    preemptions = [metric.value for metric in backend.llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert sum(preemptions) > 0
    print(f"{sum(preemptions)} preemptions")
    backend.close()


def test_tensor_parallel_ranks_answer_alike(prompts, eos, tmp_path, log, monkeypatch):
    """With a model whose heads two ranks can share; the testbed's has five. vLLM wants heads of 32 on a CPU."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # a core each: by itself vLLM wants a NUMA node each
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    for name in ("system1", "other"):
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=640, initializer_range=0.2, eos_token_id=3, **sizes))
        llama.save_pretrained(tmp_path / name)
        load_tokenizer("testbed").save_pretrained(tmp_path / name)
    ProcessVerifier.from_system1(str(tmp_path / "other"), local_files_only=True).save_pretrained(tmp_path / "verifier")
    names, prompts = (str(tmp_path / "system1"), str(tmp_path / "verifier")), prompts[:40]
    expected = [by_decoder(names[1], prompts, eos, guided, names[0], max_new_tokens=40) for guided in (True, False)]
    backend = InProcessBackend(config(model=names[0], tensor_parallel=2), names[1], 2, max_num_seqs=64)
    expect_both(backend, prompts, eos, *expected, max_tokens=40)
    ranks = [[s["logits"] for s in steps(log) if s["rank"] == rank] for rank in (0, 1)]
    both = list(zip(*ranks, strict=False))  # one rank may be about to log the last step
    assert len(both) > 50 and all(a == b for a, b in both)
    backend.close()


def test_a_prefix_head_equals_the_decoder_by_request_and_by_default(prefix_head, prompts, eos):
    expected = [by_decoder(prefix_head, prompts, eos, guided) for guided in (True, False)]
    backend = engine(prefix_head)
    expect_both(backend, prompts, eos, *expected)
    backend.close()
    defaults = {"llm2_verifier": prefix_head, **guidance_args(GUIDANCE)}
    backend = engine(prefix_head, logits_processors=None, additional_config=defaults)  # by the model alone
    written = write(backend, prompts, [request(eos, None)] * len(prompts))
    assert [row for (row,) in written] == expected[0]
    backend.close()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds: found true"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "speculative",
        ),
        ({"additional_config": {"llm2_verifier": "nowhere/at/all"}}, "expected a folder with config.json"),
        ({"additional_config": {"llm2_verifeir": "x"}}, "unknown key 'llm2_verifeir'"),
    ],
)
def test_what_does_not_work_is_refused_before_the_engine_starts(verifier, options, message):
    with pytest.raises(UserError, match=message):
        engine(verifier, **options)


def test_a_transformers_processor_acts_before_guidance_as_in_the_decoder(verifier, prompts, eos, guided, plain):
    backend = InProcessBackend(config(logits_processor=ARITHMETIC), verifier, 2, max_num_seqs=64)
    processed = [by_decoder(verifier, prompts, eos, guided=each, processor=ARITHMETIC) for each in (True, False)]
    expect_both(backend, prompts, eos, *processed)
    assert processed[0] != guided and processed[1] != plain


def test_plain_evaluation_with_a_processor_writes_what_our_engine_writes(tmp_path):
    fields = {"logits_processor": ARITHMETIC, "limit": 40, "modes": (Mode.PLAIN_GREEDY,)}
    texts = []
    for name in ("llm2", "vllm"):
        done = config(engine=name, output_dir=str(tmp_path / name), **fields)
        evaluate(done)
        lines = map(json.loads, Path(done.output_dir, "predictions.jsonl").read_text().splitlines())
        texts.append([line["samples"][0]["text"] for line in lines])
    assert texts[0] == texts[1]


def test_evaluation_writes_what_our_engine_writes(verifier, tmp_path):
    lines = {}
    for name in ("llm2", "vllm"):
        modes = ("plain_greedy", "guided_greedy", "guided_sampling")
        sizes = {"limit": 40, "num_samples": 2, "majority_at": (1, 2), "traced_samples": 2}
        fields = {"verifier": verifier, "modes": modes, "engine": name, "beta": 0.5, "split": "validation", **sizes}
        evaluate(config(**fields, output_dir=str(tmp_path / name)))
        for kind in ("predictions", "traces"):
            lines[name, kind] = [json.loads(line) for line in (tmp_path / name / f"{kind}.jsonl").open()]
    greedy = [[line for line in lines[name, "predictions"] if "greedy" in line["mode"]] for name in ("llm2", "vllm")]
    for line in greedy[0] + greedy[1]:  # in vLLM the chosen token is read again, and prefixes are counted for each
        for sample in line["samples"]:
            del sample["verifier_tokens"]
    assert close(*greedy) and len(greedy[0]) == 80
    traces = [[line for line in lines[name, "traces"] if "greedy" in line["mode"]] for name in ("llm2", "vllm")]
    assert close(*traces) and any(trace["choices"] for line in traces[0] for trace in line["traces"])


def close(a, b) -> bool:
    """Equal, but for rounding."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return abs(a - b) < 0.02 if isinstance(a, float) and isinstance(b, float) else a == b


@contextmanager
def running(folder: Path, *command: str, port: int, **variables: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """(URL, process) of a server that this command starts; its output is in FOLDER/output."""
    output = (folder / "output").open("w")
    environment = {**os.environ, "LLM2_LOG": str(folder / "steps"), **variables}
    command = [sys.executable, "-m", *command]
    process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(300):
            time.sleep(1)
            try:
                urllib.request.urlopen(f"{url}/models", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "output").read_text()[-3000:]
        yield url, process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def server(verifier, tmp_path_factory):
    """(URL, process, log of steps, output) of `llm2 serve`."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    keys = {"verifier": verifier, "port": port, "batch_size": 64, "max_model_len": 512, "beta": 0.5}
    command = ("llm2", "serve", "configs/testbed/serve.yaml", *(f"{key}={value}" for key, value in keys.items()))
    with running(folder, *command, port=port) as (url, process):
        yield url, process, folder / "steps", folder / "output"


def test_served_tokens_equal_the_decoders(server, prompts, eos, guided, plain):
    backend = ServerBackend(server[0], "testbed", 64, guides=True)
    expect_both(backend, prompts, eos, guided, plain)
    backend.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there V2 is what the other tests run")
@pytest.mark.parametrize("kind", ["verifier", "prefix_head"])
def test_the_second_model_runner_writes_what_the_decoder_writes(kind, request, prompts, eos, tmp_path):
    """On a CPU Triton interprets its kernels, slowly. vLLM wants a package with a version for CPUs and a backend named
    cpu; which backend that is does not matter, for nothing is compiled. Small chunks, few blocks."""
    verifier, prompts = request.getfixturevalue(kind), prompts[:20]
    package = tmp_path / "vllm-0+cpu.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: vllm\nVersion: 0+cpu\n")
    (package / "entry_points.txt").write_text("[triton.backends]\ncpu = triton.backends.nvidia\n")
    path = f"{tmp_path}:{os.environ['PYTHONPATH']}"
    variables = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "PYTHONPATH": path}

    port = free_port()
    small = {"enable_chunked_prefill": True, "max_num_batched_tokens": 64, "block_size": 32}
    small |= {"num_gpu_blocks_override": 64, "max_num_seqs": 64}
    options = engine_options(config(), verifier) | small | SERVER_OPTIONS | {"served_model_name": "testbed"}
    command = ("vllm.entrypoints.openai.api_server", *command_line(options | {"host": "127.0.0.1", "port": port}))
    with running(tmp_path, *command, port=port, **variables) as (url, _):
        backend = ServerBackend(url, "testbed", 64, guides=True)
        expect_both(backend, prompts, eos, *(by_decoder(verifier, prompts, eos, guided) for guided in (True, False)))
        backend.close()
        metrics = urllib.request.urlopen(url.removesuffix("v1") + "metrics").read().decode()
    (preemptions,) = [line for line in metrics.splitlines() if line.startswith("vllm:num_preemptions_total")]
    print(preemptions)
    assert float(preemptions.split()[-1]) > 0
    assert "Using V2 Model Runner" in (tmp_path / "output").read_text()


def test_the_printed_curl_line_works_and_wrong_keys_are_refused_with_status_400(server):
    (line,) = [line for line in server[3].read_text().splitlines() if line.startswith("curl ")]
    answer = json.loads(subprocess.run(line, shell=True, capture_output=True, check=True).stdout)
    assert "answer is" in answer["choices"][0]["message"]["content"]
    for xargs in ({"llm2_beta": -1}, {"llm2_bta": 0.5}, {"llm2_beta": 0.5, "llm2_alpha": 0}, {"llm2_beta": "much"}):
        with pytest.raises(UserError, match="HTTP 400: .*llm2_"):
            ServerBackend(server[0], "testbed", 1, guides=False)._answer([0, 5], {"extra_args": xargs})


# GSM8K's metric and filters; the harness sends the keys of generation_kwargs that it does not know to the server.
TASK = r"""
task: testbed_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: exact_match
    regexes_to_ignore: [",", "\\$", "(?s).*#### ", "\\.$"]
generation_kwargs:
  {{until: ["Question:"], do_sample: false, max_gen_toks: 200, vllm_xargs: {{llm2_beta: 0.5, llm2_alpha: 0.1}}}}
filter_list:
  - name: strict-match
    filter: [{{function: regex, regex_pattern: "answer is (\\-?[0-9\\.\\,]+)"}}, {{function: take_first}}]
  - name: flexible-extract
    filter:
      - {{function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{{2,}})|(-?[0-9]+)"}}
      - {{function: take_first}}
metadata: {{version: 1.0}}
"""


def test_the_harness_gets_the_same_figures_from_the_server_and_from_our_engine(server, verifier, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    import llm2.evaluation.lm_eval_model  # noqa: F401  registers `llm2`

    problems = load_task("testbed").problems("validation", min(100, PROBLEMS))
    lines = [json.dumps({"question": p.question, "answer": f"{p.solution}\n#### {p.gold}"}) for p in problems]
    (tmp_path / "problems.jsonl").write_text("\n".join(lines))
    (tmp_path / "task.yaml").write_text(TASK.format(data=tmp_path / "problems.jsonl"))
    tokenizer = str(Path("llm2/testbed/system1").absolute())
    models = {
        "llm2": {"pretrained": "testbed", "verifier": verifier, "alpha": 0.1, "beta": 0.5, "device": "cpu"},
        "local-completions": {
            "model": "testbed",
            "base_url": f"{server[0]}/completions",
            "tokenizer": tokenizer,
            "tokenizer_backend": "huggingface",
            "num_concurrent": 32,
        },
    }
    figures = {}
    for name, arguments in models.items():
        results = lm_eval.simple_evaluate(
            model=name,
            model_args=arguments,
            tasks=["testbed_local"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            apply_chat_template=True,
            batch_size=64 if name == "llm2" else 1,
        )
        scores = results["results"]["testbed_local"]
        figures[name] = {key: value for key, value in scores.items() if key.startswith("exact_match,")}
    print(figures)
    assert figures["llm2"] == figures["local-completions"] and len(figures["llm2"]) == 2


def soak(url: str, process: subprocess.Popen, prompts, eos, guided: bool) -> tuple[Counter, dict[str, list[float]]]:
    """Requests with random aborts and disconnects: how they ended, and MiB of each of the server's processes at every
    tenth of them."""
    generator, counts, lock = random.Random(0), Counter(), threading.Lock()
    main = psutil.Process(process.pid)
    tree = [main, *main.children(recursive=True)]
    jobs = [(generator.choice(prompts), generator.random(), generator.random()) for _ in range(SOAK)]
    memory: dict[str, list[float]] = {}

    def one(job) -> None:
        prompt, kind, patience = job
        content = {"model": "testbed", "prompt": prompt, "max_tokens": 200, "stop_token_ids": eos}
        if guided and kind >= 0.2:
            content["vllm_xargs"] = guidance_args(GUIDANCE)
        body = json.dumps(content | {"stream": kind > 0.6, "n": 1 + (kind > 0.9)}).encode()
        http = urllib.request.Request(f"{url}/completions", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(http, timeout=0.05 + patience if kind > 0.8 else 600) as answer:
                result = "closed early" if 0.6 < kind < 0.7 and answer.readline() else "whole"
                if result == "whole":
                    answer.read()
        except urllib.error.HTTPError as error:
            result = f"HTTP {error.code}"
        except OSError:
            result = "timed out"
        with lock:
            counts[result] += 1
            if sum(counts.values()) % (SOAK // 10) == 0:
                for each in tree:
                    name = f"{each.name()} {each.pid}"
                    memory.setdefault(name, []).append(round(each.memory_info().rss / 2**20))

    start = time.time()
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(one, jobs))
    print(f"{dict(counts)} in {time.time() - start:.0f} s; MiB: {memory}")
    assert sum(counts.values()) == SOAK and not any(result.startswith("HTTP") for result in counts)
    assert counts["closed early"] > SOAK // 20 and counts["timed out"] > SOAK // 100
    return counts, memory


def test_soak(server, prompts, eos):
    """No error, memory stays, slots are free at the end."""
    url, process, log, _ = server
    counts, memory = soak(url, process, prompts, eos, guided=True)
    assert counts["timed out"] > SOAK // 50
    time.sleep(5)
    backend = ServerBackend(url, "testbed", 1, guides=True)
    write(backend, prompts[:1], [request(eos, None)])
    total = [sum(values) for values in zip(*memory.values(), strict=True)]
    assert total[-1] < 1.05 * total[2]
    assert steps(log)[-1]["free_slots"] == 64


def test_soak_of_vllm_without_guidance(prompts, eos, tmp_path):
    """The same load, for its figures of memory: what grows here is vLLM's."""
    port = free_port()
    options = engine_options(config(), None) | {"max_num_seqs": 64, "served_model_name": "testbed"}
    command = ("vllm.entrypoints.openai.api_server", *command_line(options | {"host": "127.0.0.1", "port": port}))
    with running(tmp_path, *command, port=port) as (url, process):
        soak(url, process, prompts, eos, guided=False)
