"""Hand-made predictions of two problems in, the figures of metrics.json out."""

import pytest

from llm2.config import Mode
from llm2.evaluation.metrics import summarise


def sample(answer, correct, score=None, tokens=10, verifier_forwards=0):
    return {
        "answer": answer,
        "correct": correct,
        "correct_strict": correct,
        "score": score,
        "tokens": tokens,
        "verifier_forwards": verifier_forwards,
    }


def line(*samples):
    return {"samples": list(samples)}


PLAIN = [
    line(sample("7", True, 1.0), sample("3", False, 2.0), sample("7", True, 0.0)),
    line(sample("4", False, 0.0), sample(None, False, 3.0), sample("5", True, 1.0)),
]
GUIDED = [
    line(*[sample("7", True, 1.0, tokens=20, verifier_forwards=4)] * 3),
    line(sample("5", True, 1.0, 20, 4), sample("5", True, 0.0, 20, 4), sample(None, False, 2.0, 20, 4)),
]


@pytest.fixture(scope="module")
def metrics():
    return summarise({Mode.PLAIN_SAMPLING: PLAIN, Mode.GUIDED_SAMPLING: GUIDED}, ks=(1, 3), seed=0)


def test_majority_and_pass_are_given_for_every_k(metrics):
    plain = metrics["modes"]["plain_sampling"]
    assert plain["accuracy"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    # of 2: {7,3} twice a tie, {7,7} won: 2/3; {4,None} lost, {4,5} a tie, {None,5} won: 1/2
    assert plain["majority_at"] == pytest.approx({"1": 1 / 2, "2": (2 / 3 + 1 / 2) / 2, "3": (1 + 1 / 2) / 2})
    assert plain["pass_at"] == pytest.approx({"1": 1 / 2, "2": (1 + 2 / 3) / 2, "3": 1})
    assert metrics["reported_k"] == [1, 3]


def test_best_of_k_and_the_weighted_vote_follow_the_verifiers_scores(metrics):
    plain = metrics["modes"]["plain_sampling"]
    assert plain["best_of_at"]["3"] == 0  # in both problems a wrong sample has the highest score
    # e + 1 is less than e^2: 3 wins the first problem; e is more than 1: 5 wins the second, None has no vote
    assert plain["weighted_at"]["3"] == pytest.approx(1 / 2)
    assert metrics["modes"]["guided_sampling"]["best_of_at"]["3"] == pytest.approx(1 / 2)


def test_best_of_k_and_weighted_votes_need_a_score_of_every_sample():
    unscored = [line(sample("7", True), sample("3", False, 1.0))]
    figures = summarise({Mode.PLAIN_SAMPLING: unscored}, ks=(1,), seed=0)["modes"]["plain_sampling"]
    assert "best_of_at" not in figures and "weighted_at" not in figures and figures["pass_at"]["2"] == 1


def test_best_of_k_takes_a_refused_sample_only_where_all_are_refused():
    refused = {**sample("3", False, 2.0), "accepted": False}
    samples = line({**sample("7", True, 1.0), "accepted": True}, refused)
    best = summarise({Mode.PLAIN_SAMPLING: [samples]}, ks=(1,), seed=0)["modes"]["plain_sampling"]["best_of_at"]
    assert best == {"1": 1 / 2, "2": 1}


def test_modes_are_compared_on_the_same_problems(metrics):
    tests = {test["metric"]: test for test in metrics["paired"]}
    assert set(tests) == {"majority@1", "majority@3", "best of 3", "weighted@3"}
    assert tests["majority@3"]["difference"] == pytest.approx(1 - 3 / 4)
    assert (tests["majority@3"]["fixed"], tests["majority@3"]["broken"], tests["majority@3"]["p"]) == (1, 0, 1)


def test_cost_is_counted_per_problem(metrics):
    guided = metrics["modes"]["guided_sampling"]
    assert guided["tokens_per_problem"] == 60
    assert guided["verifier_forwards_per_token"] == pytest.approx(4 / 20)
    assert guided["system1_forwards_per_problem"] == 1 + 60 - 3
    assert guided["system2_forwards_per_problem"] == 1 + 12
    assert metrics["modes"]["plain_sampling"]["system2_forwards_per_problem"] == 0
    assert guided["scoring_forwards_per_problem"] == 3


def test_a_token_that_begins_a_branch_costs_no_forward_of_system1():
    """Three solutions with 20 tokens, of which two begin branches."""
    searched = summarise({Mode.PLAIN_SEARCH: [line(sample("7", True, 1.0) | {"tokens": 20, "solutions": 3})]}, (1,), 0)
    assert searched["modes"]["plain_search"]["system1_forwards_per_problem"] == 18
