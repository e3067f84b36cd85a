"""The command `score`: the same scores as LLM2.score, best of n and votes by hand, refusals before weights load."""

import json
import math

import pytest
from conftest import tiny_verifier

from llm2 import LLM2
from llm2.__main__ import main
from llm2.common.loading import load_tokenizer
from llm2.evaluation.rank import Line, rank
from llm2.tasks import load_task
from llm2.verifier.model import ProcessVerifier

MESSAGES = [{"role": "user", "content": "1 + 1?"}]
SOLUTIONS = ["So the answer is 2.", "The answer is 3.", "It is 2, so the answer is 2."]


@pytest.fixture(scope="module")
def verifier_folder(system1_folder, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("verifier")
    vocabulary = len(load_tokenizer(system1_folder))
    tiny_verifier(tmp_path_factory.mktemp("other"), vocab_size=vocabulary).save_pretrained(folder)
    load_tokenizer(system1_folder).save_pretrained(folder)
    return str(folder)


def write(path, *records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize("reduction", ["mean", "min", "last"])
def test_a_file_gets_the_scores_of_one_question_at_a_time(system1_folder, verifier_folder, tmp_path, reduction, capsys):
    records = [{"messages": MESSAGES, "solutions": SOLUTIONS, "kept": 7}, {"messages": MESSAGES, "solutions": ["2"]}]
    output, path = tmp_path / "scored.jsonl", write(tmp_path / "in.jsonl", *records)
    keys = [f"model={system1_folder}", f"verifier={verifier_folder}", f"output={output}", "device=cpu"]
    assert main(["score", path, *keys, f"reduction={reduction}", "batch_size=2"]) == 0
    llm2 = LLM2.from_pretrained(system1_folder, verifier_folder, device="cpu")
    found = [json.loads(line) for line in output.read_text().splitlines()]
    for record, line in zip(records, found, strict=True):
        assert {key: line[key] for key in record} == record
        assert line["scores"] == pytest.approx(llm2.score(MESSAGES, record["solutions"], reduction), abs=1e-4)
        assert line["best"] == max(range(len(line["scores"])), key=line["scores"].__getitem__)
    assert f"line 1: best of 3 is solution {found[0]['best']}" in capsys.readouterr().out


def test_votes_are_weighted_by_exp_of_the_score_and_graded_as_in_evaluation():
    line, task = Line(1, {"gold": "2"}, MESSAGES, SOLUTIONS), load_task("gsm8k")
    together = math.log(0.6)  # 2 * 0.6 > 1
    found = rank(line, [together, 0.0, together], task, graded=True)
    assert (found["best"], found["vote"], found["answers"]) == (1, "2", ["2", "3", "2"])
    assert found["accuracies"]["best of n"] == 0 and found["accuracies"]["weighted vote"] == 1
    assert found["accuracies"]["mean of all solutions"] == pytest.approx(2 / 3)
    apart = rank(line, [math.log(0.4), 0.0, math.log(0.4)], task, graded=True)  # 2 * 0.4 < 1
    assert apart["vote"] == "3" and apart["accuracies"]["weighted vote"] == 0
    assert apart["accuracies"]["majority vote"] == 1
    assert rank(line, [0.0, 0.0, 1.0], task, graded=False)["accuracies"] == {}


def test_with_a_task_and_gold_the_accuracies_are_printed(system1_folder, verifier_folder, tmp_path, capsys):
    path = write(tmp_path / "in.jsonl", {"messages": MESSAGES, "solutions": SOLUTIONS, "gold": "2"})
    keys = [f"model={system1_folder}", f"verifier={verifier_folder}", "device=cpu", "task=gsm8k"]
    assert main(["score", path, *keys, f"output={tmp_path / 'out.jsonl'}"]) == 0
    printed = capsys.readouterr().out
    assert "majority vote: 100.0% of 1 problems" in printed and "mean of all solutions: 66.7%" in printed
    assert json.loads((tmp_path / "out.jsonl").read_text())["answers"] == ["2", "3", "2"]


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": MESSAGES}, "line 1: key 'solutions': expected a list that is not empty, found None"),
        ({"messages": MESSAGES, "solutions": [3]}, "line 1: key 'solutions': expected a text, found 3"),
        ({"messages": MESSAGES, "solutions": ["a"], "gold": 2}, "line 1: key 'gold': expected a text, found 2"),
        ({"messages": [{"role": "cat", "content": ""}], "solutions": ["a"]}, "expected a role of"),
    ],
)
def test_a_bad_line_is_named_before_weights_load(
    system1_folder, verifier_folder, tmp_path, capsys, monkeypatch, record, message
):
    monkeypatch.setattr(ProcessVerifier, "from_pretrained", None)
    monkeypatch.setattr("llm2.evaluation.rank.load_system1", None)
    path = write(tmp_path / "in.jsonl", record)
    keys = [f"model={system1_folder}", f"verifier={verifier_folder}", "device=cpu"]
    assert main(["score", path, *keys, f"output={tmp_path / 'out.jsonl'}"]) == 2
    assert message in capsys.readouterr().err
    assert main(["score", path, *keys, f"output={path}"]) == 2
    assert "the file that is read" in capsys.readouterr().err
