import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import pytest
from pebble import ProcessPool

from llm2.errors import UserError
from llm2.tasks import NumberTask, Problem, load_task, math500, read_problems
from llm2.tasks.few_shot import load_few_shot
from llm2.tasks.grading import Grade, extract_answer
from llm2.tasks.math500 import MathGrader

GSM8K = Path(__file__).parents[2] / "shared" / "gsm8k"
NATALIA = {
    "question": "How many clips did Natalia sell altogether?",
    "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "She sold 1,048+24 = <<1048+24=1072>>1,072 clips.\n"
    "#### 1,072",
}


@pytest.fixture
def write(tmp_path):
    """Writes lines, dicts as JSON, to a file and gives its path."""

    def write_lines(*lines: dict | str) -> str:
        path = tmp_path / "problems.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return str(path)

    return write_lines


def test_record_becomes_problem(write):
    task = load_task("gsm8k", write(NATALIA))
    [problem] = task.problems("train")
    assert problem == Problem(
        id="train-0",
        question="How many clips did Natalia sell altogether?",
        solution="Natalia sold 48/2 = 24 clips in May. She sold 1,048+24 = 1,072 clips. So the answer is 1072.",
        gold="1072",
    )
    assert task.prompt(problem) == [{"role": "user", "content": problem.question}]
    assert task.conversation(problem) == [*task.prompt(problem), {"role": "assistant", "content": problem.solution}]


def test_ids_are_the_files_own_or_count_the_problems(write):
    data_file = write(NATALIA, "", "  ", NATALIA, {**NATALIA, "id": "mine"}, {**NATALIA, "id": 7})
    assert [problem.id for problem in load_task("gsm8k", data_file).problems("dev")] == [
        "dev-0",
        "dev-1",
        "mine",
        "7",
    ]


def test_limit_reads_no_further(write):
    data_file = write(NATALIA, NATALIA, "not JSON")
    assert len(load_task("gsm8k", data_file).problems("test", limit=2)) == 2


def test_gsm8ks_validation_split_is_the_end_of_its_training_problems(monkeypatch):
    rows = [{"question": str(index), "answer": "#### 1"} for index in range(7473)]
    monkeypatch.setattr("llm2.tasks.gsm8k.hub_rows", lambda dataset, split, subset: rows)
    problems = load_task("gsm8k").problems("validation")
    assert (len(problems), problems[0].question, problems[0].id) == (473, "7000", "validation-0")


def test_few_shot_examples_are_turns_of_the_chat(write):
    assert load_few_shot(None) == []
    messages = load_few_shot(write(NATALIA, NATALIA), num_fewshot=1)
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[1]["content"].endswith("So the answer is 1072.")
    with pytest.raises(UserError, match="has 2 examples, expected at least num_fewshot=3"):
        load_few_shot(write(NATALIA, NATALIA), num_fewshot=3)


def test_the_published_examples_end_in_their_answers():
    pytest.importorskip("lm_eval")
    answers = [extract_answer(m["content"], "strict") for m in load_few_shot("gsm8k-cot") if m["role"] == "assistant"]
    assert answers == ["6", "5", "39", "8", "9", "29", "33", "8"]  # Wei et al. (2022), table 20


MATH = {"problem": "What is 1/2 + 1/2?", "solution": "It is \\boxed{1}.", "answer": "1", "unique_id": "test/1.json"}


def test_the_math500_prompt_asks_for_a_boxed_answer(write):
    task = load_task("math500", write(MATH))
    [problem] = task.problems("test")
    assert (problem.id, problem.gold, problem.solution) == ("test/1.json", "1", "It is \\boxed{1}.")
    assert task.prompt(problem)[0]["content"].startswith("What is 1/2 + 1/2?\n\n")
    assert task.prompt(problem)[0]["content"].endswith("\\boxed{}.")


@pytest.fixture(scope="module")
def grader():
    pytest.importorskip("math_verify")
    grader = MathGrader(workers=1, time_limit=2.0)
    yield grader
    grader.close()


@pytest.mark.parametrize(
    ("text", "gold", "answer", "correct", "strict"),
    [
        ("so \\boxed{\\frac{1}{2}}", "0.5", "0.5", True, True),
        ("The answer is $x = 5$.", "5", "5", True, False),
        ("\\boxed{(1, 2)}", "(1,2)", "(1,2)", True, True),
        ("\\boxed{2\\sqrt{3}}", "\\sqrt{12}", "\\sqrt{12}", True, True),
        ("\\boxed{6}", "5", "6", False, False),
        ("\\boxed{5}\n\nProblem 2: What is 3 + 3?\n\\boxed{6}", "5", "5", True, True),
        ("no idea", "5", None, False, False),
    ],
)
def test_math_answers_are_compared_as_formulas(grader, text, gold, answer, correct, strict):
    assert grader([text], gold) == [Grade(answer, correct, strict)]


@pytest.mark.long
def test_an_endless_comparison_ends_at_its_time_limit_in_any_thread(grader):
    endless = "\\boxed{9^{9^{9^{9}}}}"
    grades = []
    thread = threading.Thread(target=lambda: grades.extend(grader([endless, "\\boxed{5}"], "5")))
    thread.start()
    thread.join()
    assert grades == [Grade(None, False, False), Grade("5", True, True)]


def end_the_process(text: str, gold: str) -> Grade:
    if text == "fatal":
        os.kill(os.getpid(), signal.SIGKILL)
    return math500.grade(text, gold)


@pytest.mark.long
def test_a_solution_that_ends_its_process_is_wrong(grader, monkeypatch):
    monkeypatch.setattr("llm2.tasks.math500.grade", end_the_process)
    right, wrong = Grade("5", True, True), Grade(None, False, False)
    assert grader(["\\boxed{5}", "fatal", "\\boxed{5}"], "5") == [right, wrong, right]


def test_a_grader_that_cannot_start_processes_raises():
    grader = MathGrader(workers=1)
    grader.pool = ProcessPool(1, initializer=sys.exit, initargs=[1], context=get_context("spawn"))
    with pytest.raises(BrokenProcessPool):
        grader(["\\boxed{5}"], "5")
    grader.close()


def test_an_empty_file_has_no_problems(write):
    assert load_task("gsm8k", write("")).problems("test") == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: expected an object, found a list"),
        ({"question": "?"}, "line 2: expected the key 'answer', found 'question'"),
        ({"answer": "#### 1"}, "line 2: expected the key 'question', found 'answer'"),
        ({"question": 1, "answer": "#### 1"}, "line 2: key 'question': expected a text, found 1"),
        (
            {"question": "?", "answer": "It is 72."},
            "line 2: key 'answer': expected `#### number` at its end, found 'It is 72.'",
        ),
        (
            {"question": "?", "answer": "#### many"},
            "line 2: key 'answer': expected `#### number` at its end, found '#### many'",
        ),
    ],
)
def test_bad_line_is_named_in_one_sentence(write, line, message):
    data_file = write(NATALIA, line)
    with pytest.raises(UserError) as error:
        load_task("gsm8k", data_file).problems("test")
    assert message in str(error.value)
    assert data_file in str(error.value)
    assert "\n" not in str(error.value)


def chat(**fields) -> dict:
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes."}], **fields}


def unsure(text: str, gold: str):
    return {"a": "False", "b": None, "c": 1, "d": False}[text]


def test_a_grader_answers_yes_or_no():
    task = load_task("chats", "unused", grader="test_tasks:unsure")
    for text, found in (("a", "'False'"), ("b", "None")):
        with pytest.raises(UserError, match=f"returned {found}, expected True or False"):
            task.grade([text], "5")
    assert [grade.correct for grade in task.grade(["c", "d"], "5")] == [True, False]


@pytest.mark.parametrize(("record", "gold"), [(chat(answer="yes", id="q7"), "'yes'"), (chat(id="q7"), "'Yes.'")])
def test_a_gold_answer_without_a_number_needs_a_grader(write, record, gold):
    data_file = write(chat(answer=5), record)
    with pytest.raises(UserError) as error:
        read_problems(load_task("chats", data_file), "test")
    said = f"{data_file}: problem q7: expected one number as gold answer, found {gold}; grader=MODULE:FUNCTION"
    assert str(error.value).startswith(said)
    assert len(read_problems(load_task("chats", data_file, grader="operator:contains"), "test")) == 2


@pytest.mark.parametrize("gold", ["3 1/2", "10:30", "1 000"])
def test_a_gold_answer_of_several_numbers_needs_a_grader(write, gold):
    data_file = write(chat(answer=gold))
    with pytest.raises(UserError, match="expected one number as gold answer"):
        read_problems(load_task("chats", data_file), "test")


def test_fields_of_a_problem_are_texts():
    class Numbers(NumberTask):
        def problems(self, split, limit=None):
            return [Problem("0", "What is 9 + 9?", 18)]

    with pytest.raises(UserError, match="problem '0': gold: found 18, expected a text"):
        read_problems(Numbers(None), "test")


@pytest.mark.parametrize(("number", "text"), [(1e-5, "0.00001"), (1e16, "10,000,000,000,000,000"), (-2.5, "-5/2")])
def test_a_number_of_json_is_compared_as_a_number(write, number, text):
    task = load_task("chats", write(chat(answer=number)))
    [problem] = read_problems(task, "test")
    assert [grade.correct for grade in task.grade([f"The answer is {text}.", "5", "16"], problem.gold)] == [
        True,
        False,
        False,
    ]


def test_unreadable_file_is_named(tmp_path):
    with pytest.raises(UserError, match="missing.jsonl: No such file"):
        load_task("gsm8k", str(tmp_path / "missing.jsonl")).problems("test")
    with pytest.raises(UserError, match="Is a directory"):
        load_task("gsm8k", str(tmp_path)).problems("test")
    (tmp_path / "latin1.jsonl").write_bytes(b"\xe9")
    with pytest.raises(UserError, match="expected UTF-8 text, found byte 0xe9"):
        load_task("gsm8k", str(tmp_path / "latin1.jsonl")).problems("test")


@pytest.mark.parametrize(
    ("benchmark", "split", "message"),
    [
        (
            "gsm9k",
            "test",
            "key 'task': found 'gsm9k', expected one of gsm8k, .*, chats, or MODULE:CLASS",
        ),
        ("os:path", "test", "key 'task': 'os:path' is no subclass of llm2.tasks.Task"),
        ("gsm8k", "dev", "gsm8k has no split 'dev': expected one of train, validation, test"),
        ("testbed", "dev", "testbed has no split 'dev': expected one of pretrain, train, validation, test"),
    ],
)
def test_unknown_names_are_refused(benchmark, split, message):
    with pytest.raises(UserError, match=message):
        load_task(benchmark).problems(split)


@pytest.mark.parametrize("split", ["pretrain", "train", "validation", "test"])
def test_testbed_problems_are_worked_to_their_gold_answer(split):
    problems = load_task("testbed").problems(split, limit=20)
    assert len({problem.id for problem in problems}) == 20
    for problem in problems:
        assert problem.solution.endswith(f" So the answer is {problem.gold}.")
        assert "<<" not in problem.solution


@pytest.mark.parametrize(("split", "size"), [("test", 1319), ("train", 7473)])
def test_all_of_gsm8k_loads_from_local_files(split, size):
    file = GSM8K / f"{split}.jsonl"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    problems = load_task("gsm8k", str(file)).problems(split)
    assert len({problem.id for problem in problems}) == size
    for problem in problems:
        assert problem.solution.endswith(f" So the answer is {problem.gold}.")
        assert not any(mark in problem.solution for mark in ("<<", ">>", "####", "\n"))
        int(problem.gold)


def test_the_hubs_rows_become_problems(monkeypatch):
    import datasets

    calls = []
    monkeypatch.setattr("llm2.tasks.hub.hub_answers", lambda dataset: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: calls.append((*names, split)) or [NATALIA] * 3)
    assert [problem.id for problem in load_task("gsm8k").problems("test", limit=2)] == ["test-0", "test-1"]
    assert calls == [("openai/gsm8k", "main", "test")]


WITHOUT_NETWORK = """
import socket, sys, time
def unreachable(*_, **__):
    raise socket.gaierror(-2, "Name or service not known")
def patient(seconds):
    print("slept", seconds)
socket.getaddrinfo = socket.socket.connect = unreachable
time.sleep = patient  # a client sleeps before it retries
from llm2.tasks import load_task
from llm2.errors import UserError
try:
    print(len(load_task("gsm8k", sys.argv[1] if sys.argv[1:] else None).problems("test")))
except UserError as error:
    print(error)
"""


@pytest.mark.long
@pytest.mark.parametrize("offline", ["0", "1"])
def test_an_unreachable_hub_is_refused_quickly_in_one_sentence(tmp_path, offline):
    output = run_without_network(tmp_path, HF_HUB_OFFLINE=offline)
    assert output.count("\n") == 1
    assert "data_file=" in output
    assert "task=testbed" in output


def test_a_local_file_needs_no_network(tmp_path, write):
    assert run_without_network(tmp_path, write(NATALIA)) == "1\n"


def run_without_network(home: Path, *arguments: str, **settings: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_NETWORK, *arguments],
        env={**os.environ, "HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[1]), **settings},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    ).stdout


def readme_task() -> str:
    """The worked example of llm2/tasks/README.md."""
    text = (Path(__file__).parents[1] / "llm2" / "tasks" / "README.md").read_text()
    return text.split("```python\n")[1].split("```")[0]


def test_the_readmes_task_is_short_and_grades_its_own_solutions(tmp_path, monkeypatch):
    assert len(readme_task().splitlines()) < 30
    (tmp_path / "weekdays.py").write_text(readme_task())
    monkeypatch.chdir(tmp_path)
    task = load_task("weekdays:Weekdays")
    for problem in task.problems("test", 5):
        (grade,) = task.grade([f"That is a {problem.gold}."], problem.gold)
        assert grade.correct and grade.answer == problem.gold
        assert not task.grade(["No idea."], problem.gold)[0].correct


@pytest.mark.slow
def test_the_readmes_task_is_explored_trained_on_and_evaluated(tmp_path, monkeypatch):
    """A small model that knows the days is trained here, so that exploration has something to find."""
    from weekday_model import save_weekday_model

    from llm2.config import EvaluateConfig, ExploreConfig, Mode, TrainConfig
    from llm2.evaluation.evaluate import evaluate
    from llm2.exploration.explore import explore
    from llm2.verifier.train import train

    (tmp_path / "weekdays.py").write_text(readme_task())
    monkeypatch.chdir(tmp_path)
    model = save_weekday_model(tmp_path / "system1", load_task("weekdays:Weekdays"))
    common = {"model": model, "device": "cpu"}
    task = {"task": "weekdays:Weekdays", "max_new_tokens": 30, **common}
    report = explore(ExploreConfig(**task, output="triplets.jsonl", limit=20))
    assert report["triplets"] > 0
    sizes = {"global_batch_size": 4, "per_device_train_batch_size": 4, "evaluations": 1, "num_train_epochs": 1.0}
    train(TrainConfig(**common, **sizes, train_file="triplets.jsonl", output_dir="verifier", eval_share=0.2))
    modes = (Mode.PLAIN_GREEDY, Mode.GUIDED_GREEDY)
    metrics = evaluate(EvaluateConfig(**task, verifier="verifier", output_dir="results", limit=10, modes=modes))
    assert metrics["benchmark"] == "weekdays:Weekdays" and set(metrics["modes"]) == {mode.value for mode in modes}
