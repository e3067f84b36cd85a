"""MAWPS and SVAMP as committed in dataset/word_problems."""

import json

import pytest

from llm2.errors import UserError
from llm2.tasks import load_task, read_problems, require_distinct_ids, word_problems
from llm2.tasks.word_problems import to_problem


@pytest.mark.parametrize(
    ("name", "split", "size"), [("mawps", "train", 1434), ("mawps", "validation", 300), ("svamp", "test", 700)]
)
def test_every_gold_solution_is_right_and_no_problem_comes_twice(name, split, size):
    task = load_task(name)
    problems = read_problems(task, split)
    assert len(problems) == size
    require_distinct_ids(task, problems)
    for problem in problems:
        (grade,) = task.grade([problem.solution], problem.gold)
        assert grade.correct and grade.correct_strict, problem
        assert problem.solution.count("(") == problem.solution.count(")")


def test_the_splits_share_no_question():
    splits = [("mawps", "train"), ("mawps", "validation"), ("svamp", "test")]
    questions = [problem.question for name, split in splits for problem in read_problems(load_task(name), split)]
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize(
    ("answer", "solution"),
    [
        ("(8 - 2) #### 6", "8 - 2 = 6. The answer is 6."),
        ("( 30 - ( 47 - 30 ) ) #### 13", "30 - (47 - 30) = 13. The answer is 13."),
        ("((7 + 5) * (1 + 1)) #### 24", "(7 + 5) * (1 + 1) = 24. The answer is 24."),
        ("(7 + 5) * (1 + 1) #### 24", "(7 + 5) * (1 + 1) = 24. The answer is 24."),
        ("7.50 - 1.5 #### 6.0", "7.50 - 1.5 = 6. The answer is 6."),
    ],
)
def test_an_equation_becomes_a_sentence(answer, solution):
    assert to_problem("0", "How many?", answer).solution == solution


def test_a_file_of_ones_own_is_read_in_the_same_format(tmp_path):
    path = tmp_path / "own.jsonl"
    lines = [{"question": "a?", "answer": "(1 + 1) #### 2", "id": "first"}, {"question": "b?", "answer": "(2 + 1)"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (problem,) = read_problems(load_task("svamp", str(path)), "train", 1)
    assert (problem.id, problem.gold) == ("first", "2")
    with pytest.raises(UserError, match=r"own.jsonl, line 2: key 'answer': expected `#### number` at its end"):
        read_problems(load_task("svamp", str(path)), "train")


def test_unknown_splits_and_installs_without_the_files_are_refused(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="svamp has no split 'train': expected one of test"):
        read_problems(load_task("svamp"), "train")
    monkeypatch.setattr(word_problems, "FOLDER", tmp_path / "none")
    with pytest.raises(UserError, match="mawps is part of a checkout; expected data_file=<mawps_train.jsonl>"):
        read_problems(load_task("mawps"), "train")
