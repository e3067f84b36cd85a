"""The harness itself, run on a local task with the testbed's System 1."""

import json
import re
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from llm2.common.chat import encode_chats
from llm2.common.distributed import destroy_group, dist_info
from llm2.decoding.decoder import Decoder
from llm2.evaluation.lm_eval_model import HarnessModel
from llm2.tasks import load_task
from llm2.tasks.grading import extract_answer, is_correct
from llm2.verifier.model import ProcessVerifier

SYSTEM1 = "llm2/testbed/system1"
N = 6
# The metric and the filters are those of the harness's own gsm8k.
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
generation_kwargs: {{until: ["Question:"], do_sample: false, max_gen_toks: 160}}
filter_list:
  - name: strict-match
    filter: [{{function: regex, regex_pattern: "answer is (\\-?[0-9\\.\\,]+)"}}, {{function: take_first}}]
  - name: flexible-extract
    filter:
      - {{function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{{2,}})|(-?[0-9]+)"}}
      - {{function: take_first}}
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def verifier(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("verifier"))
    torch.manual_seed(0)
    ProcessVerifier.from_system1(SYSTEM1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A task of the harness and its problems."""
    folder = tmp_path_factory.mktemp("harness")
    problems = load_task("testbed").problems("test", N)
    lines = [json.dumps({"question": p.question, "answer": f"{p.solution}\n#### {p.gold}"}) for p in problems]
    (folder / "problems.jsonl").write_text("\n".join(lines))
    (folder / "task.yaml").write_text(TASK.format(data=folder / "problems.jsonl"))
    return folder


def run_harness(folder: Path, verifier: str) -> list[dict] | None:
    """The harness's log of each problem; None on all processes but the first."""
    results = lm_eval.simple_evaluate(
        model="llm2",
        model_args=f"pretrained={SYSTEM1},verifier={verifier},alpha=0.1,beta=4.0",
        tasks=["testbed_local"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),  # its own thousands take seconds
        apply_chat_template=True,
        device="cpu",
        batch_size=4,
    )
    return results and results["samples"]["testbed_local"]


@pytest.fixture(scope="module")
def samples(folder, verifier) -> list[dict]:
    return run_harness(folder, verifier)


def evaluate_as_rank(folder: Path, verifier: str) -> None:
    samples = run_harness(folder, verifier)
    assert (samples is None) == (not dist_info().is_main)
    if samples is not None:
        (folder / "ranks.json").write_text(json.dumps(responses(samples)))
    destroy_group()


def responses(samples: list[dict]) -> list[list[str]]:
    return sorted([sample["doc"]["question"], sample["filter"], sample["resps"][0][0]] for sample in samples)


@pytest.mark.long
def test_two_processes_share_the_requests_and_give_the_responses_of_one(folder, samples, verifier):
    assert run_ranks(evaluate_as_rank, folder, verifier) == [0, 0]
    assert json.loads((folder / "ranks.json").read_text()) == responses(samples)


@pytest.mark.parametrize(("rank", "expected"), [(None, "cuda:1"), (3, "cuda:3")])
def test_a_process_keeps_the_index_of_its_device_and_each_of_several_has_its_own(monkeypatch, rank, expected):
    class Loaded(Exception):
        pass

    def from_pretrained(*names, device, **options):
        raise Loaded(device)

    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("llm2.evaluation.lm_eval_model.LLM2.from_pretrained", from_pretrained)
    if rank is not None:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4}.items():
            monkeypatch.setenv(name, str(value))
    with pytest.raises(Loaded, match=expected):
        HarnessModel(SYSTEM1, device="cuda:1" if rank is None else "cuda")


def test_the_harness_gets_the_decoders_text(samples, verifier):
    model = HarnessModel(SYSTEM1, verifier, beta=4.0, device="cpu").llm2
    problems = {problem.question: problem for problem in load_task("testbed").problems("test", N)}
    prompts = encode_chats(
        model.tokenizer, [load_task("testbed").prompt(p) for p in problems.values()], generation_prompt=True
    )
    rows = Decoder(model.system1, model.guidance).decode(prompts, max_new_tokens=160, eos=model.eos)
    ours = {
        question: model.tokenizer.decode(row.token_ids, skip_special_tokens=True)
        for question, (row,) in zip(problems, rows, strict=True)
    }
    assert {sample["doc"]["question"]: sample["resps"][0][0] for sample in samples} == ours


def test_the_harness_grades_as_the_task_does(samples):
    assert {sample["filter"] for sample in samples} == {"strict-match", "flexible-extract"}
    assert len(samples) == 2 * N
    for sample in samples:
        mode = sample["filter"].partition("-")[0]
        assert bool(sample["exact_match"]) == is_correct(sample["resps"][0][0], sample["doc"]["answer"], mode)


@pytest.mark.parametrize(
    ("text", "theirs", "ours"),
    [
        ("It is 18.00", "18.00", "18"),  # numbers as strings: right answers in another form are wrong there
        ("She makes $18.", "$18.", "18"),  # the same, until the metric strips the dollar and the dot
        ("Half of it is 1/2.", "2.", "0.5"),  # a fraction is two numbers there
        ("The answer is 18 (9 eggs at $2).", "$2", "18"),  # the last number, even behind an announced answer
        ("18 eggs.\n\nProblem: Tom has 5 eggs", "5", "18"),  # even the next problem's: `Question:` ends a text
        ("10 - 3 is -3? No: 5-3", "-3", "3"),  # a minus between numbers is a sign there
    ],
)
def test_known_differences_between_the_harness_and_our_extraction(text, theirs, ours):
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)[-1]
    assert next(filter(None, found)).strip() == theirs
    assert extract_answer(text) == ours


def requests(*arguments) -> list[Instance]:
    return [Instance("generate_until", {}, argument, index) for index, argument in enumerate(arguments)]


def test_a_stop_string_ends_the_text_and_is_not_part_of_it():
    model = HarnessModel(SYSTEM1, device="cpu", max_gen_toks=60)
    context = model.apply_chat_template([{"role": "user", "content": "Adam makes $6 an hour and works 4 hours."}])
    (whole,) = model.generate_until(requests((context, {})), disable_tqdm=True)
    stop = whole[10:14]
    both = requests((context, {"until": [stop]}), (context, {"until": "never", "max_gen_toks": 5}))
    stopped, short = model.generate_until(both, disable_tqdm=True)
    assert stopped == whole[: whole.index(stop)]
    assert whole.startswith(short) and len(model.llm2.tokenizer(short)["input_ids"]) <= 6


def test_ranking_given_continuations_is_refused():
    model = HarnessModel(SYSTEM1, device="cpu")
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood([])
