"""The key `accept`: refused solutions have no vote, whatever else decides."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.results.problem_numbers import accept
from llm2.common.stats import majority_curve
from llm2.config import EvaluateConfig, Mode
from llm2.errors import UserError
from llm2.evaluation.evaluate import check, evaluate
from llm2.tasks import load_task

CODE = """
from llm2.tasks.grading import extract_answer

def odd(question, text):
    return extract_answer(text) is not None and int(float(extract_answer(text))) % 2 == 1

def none(question, text):
    return False

def fails(question, text):
    return 1 / 0

def unsure(question, text):
    return None

class NoFunction:
    pass
"""


@pytest.fixture
def config(tmp_path, monkeypatch) -> EvaluateConfig:
    (tmp_path / "accepting.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return EvaluateConfig(
        model="testbed",
        task="testbed",
        modes=(Mode.PLAIN_SEARCH, Mode.PLAIN_SAMPLING),
        output_dir=str(tmp_path / "results"),
        limit=12,
        num_samples=4,
        majority_at=(1, 4),
        search_solutions=6,
        max_new_tokens=120,
        batch_size=32,
        device="cpu",
        accept="accepting:odd",
    )


def samples(config: EvaluateConfig, mode: Mode) -> list[list[dict]]:
    lines = map(json.loads, Path(config.output_dir, "predictions.jsonl").read_text().splitlines())
    return [line["samples"] for line in lines if line["mode"] == mode]


def test_a_search_goes_on_until_a_solution_is_accepted(config, tmp_path):
    evaluate(config)
    plain = replace(config, accept=None, modes=(Mode.PLAIN_SEARCH,), output_dir=str(tmp_path / "plain"))
    evaluate(plain)
    with_code, without = (sum(samples(of, Mode.PLAIN_SEARCH), []) for of in (config, plain))
    assert all("accepted" not in sample for sample in without)
    turned = 0
    for one, other in zip(with_code, without, strict=True):
        is_odd = int(float(one["answer"] or 0)) % 2 == 1
        assert one["accepted"] == is_odd
        assert is_odd or one["vote"] == 0  # nothing that it found is accepted
        turned += is_odd and one["answer"] != other["answer"]
    assert turned > 1, "code must change answers"


def test_refused_samples_have_no_vote(config):
    majority = evaluate(replace(config, modes=(Mode.PLAIN_SAMPLING,)))["modes"]["plain_sampling"]["majority_at"]
    records = samples(config, Mode.PLAIN_SAMPLING)
    assert {sample["accepted"] for row in records for sample in row} == {True, False}
    counted, everybody = Counter(), Counter()  # the shares of votes that gold wins, by k
    for row in records:
        gold = next((sample["answer"] for sample in row if sample["correct"]), None)
        answers = [sample["answer"] for sample in row]
        accepted = [sample["answer"] if sample["accepted"] else None for sample in row]
        for shares, voting in ((counted, accepted), (everybody, answers)):
            shares.update({str(k): share / len(records) for k, share in enumerate(majority_curve(voting, gold), 1)})
    assert majority == pytest.approx(counted)
    assert majority != pytest.approx(everybody)


def test_without_an_accepted_solution_the_likeliest_one_stays(config):
    config = replace(config, accept="accepting:none", modes=(Mode.PLAIN_GREEDY, Mode.PLAIN_SEARCH), limit=3)
    evaluate(config)
    greedy, searched = (sum(samples(config, mode), []) for mode in config.modes)
    assert len(searched) == 3 and all(sample["text"] for sample in searched)
    assert not any(sample["accepted"] for sample in greedy + searched)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("accepting", "MODULE:FUNCTION"),
        ("accepting:missing", "cannot be imported"),
        ("nowhere:odd", "cannot be imported"),
        ("accepting:NoFunction", "is no function"),
    ],
)
def test_what_is_no_function_is_refused_before_weights_load(config, name, message):
    with pytest.raises(UserError, match=f"accept.*{message}"):
        check(replace(config, model="nothing-here", accept=name))


@pytest.mark.parametrize(("name", "message"), [("fails", "division"), ("unsure", "returned None")])
def test_a_function_that_fails_is_named(config, name, message):
    with pytest.raises(UserError, match=f"accept.*accepting:{name}.*{message}"):
        evaluate(replace(config, accept=f"accepting:{name}", limit=1, modes=(Mode.PLAIN_GREEDY,)))


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("27 + 41 = 68. The answer is 68.", True),
        ("(27 + 41) - 2 = 66. The answer is 66.", True),  # two, in words
        ("41 * 12.0 = 492.0. The answer is 492.0.", True),  # a constant
        ("27 + 27 = 54. The answer is 54.", False),
        ("27 + 14 = 41. The answer is 41.", False),
        ("27 - 41 =  -14. The answer is -14.", False),
        ("27 - 41 = 14. The answer is -14.", False),
        ("1,200 / 41 = 29.27.", True),
        ("The answer is 68.", False),
    ],
)
def test_an_equation_has_the_numbers_of_its_problem(text, accepted):
    assert accept("Ann has 27 pens, Ben 41, and two of 1,200 are red. How many?", text) is accepted


def test_gold_equations_are_accepted_but_for_one_in_a_hundred():
    problems = load_task("mawps").problems("train")
    assert sum(accept(problem.question, problem.solution) for problem in problems) == 1419
    assert len(problems) == 1434
