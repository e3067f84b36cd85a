"""Metrics of held-out pairs by hand: parts, kinds of tokens, accuracies, and System 1's margins."""

import pytest
import torch
from test_collate import examples

from llm2.verifier.pair_metrics import PairInfo, compute_metrics, pair_info, system1_margins, table, token_kind
from llm2.verifier.triplets import Example, Triplet


@pytest.mark.parametrize(
    "text, expected",
    [("7", "digit"), (" 12", "digit"), (" *", "operator"), ("/", "operator"), (" half", "word"), (".", "other")],
)
def test_kinds_of_tokens(text, expected):
    assert token_kind(text) == expected


def test_each_pair_has_a_part_and_a_kind(tokenizer):
    """A prompt of 2 tokens and a solution of 10: positions 2 and 3 are its first fifth, 10 and 11 the last."""
    seven, star = (tokenizer(text)["input_ids"][0] for text in "7*")
    example = Example([0] * 12, [Triplet(3, seven, 5), Triplet(10, star, 5)], start=2, first_pair_id=40)
    assert pair_info([example], tokenizer) == {40: PairInfo(1, "digit"), 41: PairInfo(5, "operator")}


def test_metrics_by_hand():
    pairs = {3: PairInfo(1, "digit"), 4: PairInfo(1, "word"), 9: PairInfo(5, "digit"), 10: PairInfo(5, "digit")}
    found = compute_metrics({3: 2.0, 4: -1.0, 9: 0.5, 10: -3.5, 77: 9.0}, pairs)
    assert (found["pair_accuracy"], found["pairs"], found["mean_margin"]) == (0.5, 4, -0.5)
    assert found["pair_accuracy_low"] == pytest.approx(0.15, abs=0.01)  # Wilson, 2 of 4
    assert (found["pair_accuracy_part_1"], found["pairs_part_1"]) == (0.5, 2)
    assert found["pair_accuracy_digit"] == pytest.approx(2 / 3) and found["pairs_digit"] == 3
    assert found["pair_accuracy_word"] == 0 and "pair_accuracy_operator" not in found


def test_system1s_margins_are_differences_of_log_probabilities(system1):
    data = examples(3)
    found = system1_margins(system1, data)
    assert len(found) == sum(len(example.triplets) for example in data)
    for example in data:
        with torch.inference_mode():
            logp = system1(torch.tensor([example.ids])).logits[0].log_softmax(-1)
        for pair_id, (position, gold, negative) in enumerate(example.triplets, start=example.first_pair_id):
            expected = (logp[position - 1, gold] - logp[position - 1, negative]).item()
            assert found[pair_id] == pytest.approx(expected, abs=1e-4)


def test_the_table_shows_the_verifier_beside_system1():
    pairs = {0: PairInfo(1, "digit"), 1: PairInfo(5, "word")}
    metrics = {f"eval_{name}": value for name, value in compute_metrics({0: 1.0, 1: 1.0}, pairs).items()}
    metrics |= {f"system1_{name}": value for name, value in compute_metrics({0: 1.0, 1: -1.0}, pairs).items()}
    rows = [line.split() for line in table(metrics).splitlines()]
    assert rows[1] == ["all", "100.0%", "50.0%", "2"] and ["word", "100.0%", "0.0%", "1"] in rows
    assert len(rows) == 1 + 1 + 2 + 2
