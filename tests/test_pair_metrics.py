"""Metrics of held-out pairs by hand: parts, kinds of tokens, accuracies, and System 1's margins."""

import math

import pytest
import torch
from conftest import VOCABULARY
from test_collate import examples
from transformers import AutoConfig, AutoModelForCausalLM

from llm2.verifier.pair_metrics import (
    PairInfo,
    Rival,
    WithSystem1Margins,
    calibration,
    choice_metrics,
    choice_quality,
    compute_metrics,
    fork_rivals,
    guided_metrics,
    pair_info,
    system1_margins,
    table,
    token_kind,
)
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


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere"])
def test_system1s_margins_are_differences_of_log_probabilities(family, system1):
    """Of the model's own logits, which some families scale or cap."""
    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    capped = {"gemma2": {"final_logit_softcapping": 0.5}, "granite": {"logits_scaling": 8.0}, "cohere": {}}
    if family in capped:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **shape, **heads, **capped[family])
        system1 = AutoModelForCausalLM.from_config(config).eval()
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


def test_choice_quality_by_hand():
    """System 1 takes a token that is worse than gold at one fork, and misses one that is better at the other."""
    forks = [[Rival(1, 1.0, -0.5)], [Rival(2, -0.25, 0.2), Rival(3, 0.5, 3.0)]]
    margins = {1: 2.0, 2: -1.0, 3: 0.0}
    assert choice_quality(forks, margins, 0.0) == -0.5  # (-1.0 + 0) / 2
    assert choice_quality(forks, margins, 0.5) == 0.125  # (0 + 0.25) / 2
    found = choice_metrics(forks, margins)
    # of equal qualities the smallest beta
    assert (found["choice_quality"], found["choice_beta"], found["choice_quality_plain"]) == (0.125, 0.25, -0.5)


def test_calibration_by_hand():
    """Of three benign rivals, of which one is better than gold, guidance suppresses one; of two harmful ones both."""
    gaps, scores = [0.0, 0.1, -0.5, 0.2, 0.5, 1.0], [0.4, 0.6, -3.0, 0.2, 1.0, 2.0]
    forks = [[Rival(i, gap, 0.0)] for i, gap in enumerate(gaps)]
    found = calibration(forks, dict(enumerate(scores)), beta=2.0)
    assert (found["benign"], found["harmful"], found["harmful_suppressed"]) == (3, 2, 1.0)
    assert found["benign_suppressed"] == pytest.approx(1 / 3)
    assert found["margin_spearman"] == pytest.approx(
        1 - 6 * (1 + 1 + 4) / (6 * 35)
    )  # ranks 2 3 1 4 5 6 and 3 4 1 2 5 6
    equal = calibration([[Rival(0, 0.2, 0.0)]], {0: 1.0}, beta=1.0)
    assert equal == {}


def test_guided_metrics_by_hand():
    """z + beta * s is 1 and 0.5 with beta 0.5, 2.5 and -1 with 2; z alone orders one of the two pairs."""
    scores, z = {4: 1.0, 5: -1.0, 9: 70.0}, {4: 0.5, 5: 1.0, 9: -9.0}
    found = guided_metrics(scores, [4, 5], z)
    losses = {beta: sum(math.log1p(math.exp(-z[i] - beta * scores[i])) for i in (4, 5)) / 2 for beta in (0.25, 0.5)}
    assert losses[0.25] < losses[0.5]
    assert found["guided_beta"] == 0.25 and found["guided_pair_loss"] == pytest.approx(losses[0.25])
    assert (found["guided_pair_accuracy"], found["guided_pair_accuracy_plain"]) == (1.0, 1.0)
    found = guided_metrics(scores, [4, 5, 9], z)
    assert found["guided_beta"] == 0.25 and found["guided_pair_accuracy_plain"] == pytest.approx(2 / 3)
    assert found["guided_pair_accuracy"] == 1.0


def test_examples_get_the_margins_of_their_own_pairs():
    data = examples(3)
    margins = {pair: float(pair) for each in data for pair in range(each.first_pair_id, each.first_pair_id + 99)}
    for example, plain in zip(WithSystem1Margins(data, margins), data, strict=True):
        first, count = plain.first_pair_id, len(plain.triplets)
        assert example.system1_margins == [float(pair) for pair in range(first, first + count)]
        assert example._replace(system1_margins=()) == plain


def test_a_pair_without_qualities_counts_as_a_whole_loss():
    triplets = [Triplet(3, 7, 5), Triplet(3, 7, 6), Triplet(5, 8, 9)]
    soft = Example([0] * 9, triplets, first_pair_id=2, quality_gaps=[0.5, 0.0, -0.5], gold_better=[0.9, 0.5, 0.1])
    hard = soft._replace(gold_better=[], quality_gaps=[], first_pair_id=5)
    margins = dict.fromkeys(range(2, 8), 1.0)
    of_soft = [[Rival(2, 0.5, 1.0), Rival(3, 0.0, 1.0)], [Rival(4, -0.5, 1.0)]]
    assert fork_rivals([soft, hard], margins) == [
        *of_soft,
        [Rival(5, 1.0, 1.0), Rival(6, 1.0, 1.0)],
        [Rival(7, 1.0, 1.0)],
    ]
