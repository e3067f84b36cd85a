"""The plausible set and the guided logits, by hand."""

import math

import torch

from llm2.decoding.candidates import guided_logits, plausible

LOGITS = torch.log(torch.tensor([[0.60, 0.25, 0.10, 0.05], [0.01, 0.96, 0.02, 0.01]]))


def test_plausible_is_alpha_times_the_top_probability():
    candidates, valid = plausible(LOGITS, alpha=0.15)
    assert candidates.tolist()[0] == [0, 1, 2] and candidates[1, 0] == 1
    assert valid.tolist() == [[True, True, True], [True, False, False]]


def test_top_k_caps_the_set():
    candidates, valid = plausible(LOGITS, alpha=0.15, top_k=2)
    assert candidates.tolist()[0] == [0, 1] and valid.tolist() == [[True, True], [True, False]]


def test_alpha_one_leaves_the_best_token_and_alpha_zero_all():
    assert plausible(LOGITS, alpha=1.0)[0].tolist() == [[0], [1]]
    assert plausible(LOGITS, alpha=0.0)[1].all()


def test_guided_logits_add_beta_times_the_score_and_rule_out_the_rest():
    candidates, valid = plausible(LOGITS, alpha=0.15)
    scores = torch.tensor([[-1.0, 2.0, 0.0], [5.0, 5.0, 5.0]])
    guided = guided_logits(LOGITS.gather(-1, candidates), valid, scores, beta=0.5)
    expected = [math.log(0.60) - 0.5, math.log(0.25) + 1.0, math.log(0.10)]
    torch.testing.assert_close(guided[0], torch.tensor(expected))
    assert guided[1].isinf().tolist() == [False, True, True]
