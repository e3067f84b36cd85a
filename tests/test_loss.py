"""The losses by hand; they do not depend on how pairs were batched."""

import math

import pytest
import torch
import torch.nn.functional as F

from llm2.verifier import loss as losses
from llm2.verifier.loss import chunked_cross_entropy, pair_accuracy, pairwise_loss


def test_loss_by_hand():
    """-log sigmoid(0) = log 2; -log sigmoid(log 3) = log(4 / 3)."""
    loss = pairwise_loss(torch.tensor([[0.0, math.log(3)]]), torch.ones(1, 2))
    assert loss.item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)


def test_a_pair_of_weight_k_counts_as_k_pairs():
    """A pair of weight 3 is three pairs; one of weight 0 is none."""
    loss = pairwise_loss(torch.tensor([[0.0, math.log(3), -9.0]]), torch.tensor([[3.0, 1.0, 0.0]]))
    assert loss.item() == pytest.approx((3 * math.log(2) + math.log(4 / 3)) / 4)


def test_a_margin_moves_the_even_point():
    assert pairwise_loss(torch.tensor([2.0]), torch.ones(1), margin=2.0).item() == pytest.approx(math.log(2))


def test_parts_add_up_to_the_mean_over_all_pairs():
    margins, weights = torch.randn(12), torch.rand(12)
    whole, total = pairwise_loss(margins, weights), weights.sum()
    parts = [pairwise_loss(margins[part], weights[part], total) for part in (slice(0, 1), slice(1, 7), slice(7, 12))]
    torch.testing.assert_close(sum(parts), whole)


def test_a_batch_without_pairs_is_zero_and_not_nan():
    assert pairwise_loss(torch.zeros(1, 0), torch.zeros(1, 0)).item() == 0


def test_the_chunked_cross_entropy_is_cross_entropy(monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_CHUNK", 3)
    torch.manual_seed(0)
    hidden, weight = torch.randn(8, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    targets = torch.randint(11, (8,))
    loss = chunked_cross_entropy(hidden, weight, targets)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    for gradient, twin in zip(gradients, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(gradient, twin)


def test_pair_accuracy_counts_a_tie_half():
    assert pair_accuracy(torch.tensor([1.0, -1.0, 0.0, 2.0])) == pytest.approx(2.5 / 4)


def test_a_soft_target_gives_the_cross_entropy_of_both_outcomes():
    margins, targets = torch.tensor([0.5, -1.0]), torch.tensor([0.75, 0.5])
    by_hand = [
        -0.75 * math.log(1 / (1 + math.exp(-0.5))) - 0.25 * math.log(1 / (1 + math.exp(0.5))),
        -0.5 * math.log(1 / (1 + math.exp(1.0))) - 0.5 * math.log(1 / (1 + math.exp(-1.0))),
    ]
    loss = pairwise_loss(margins, torch.ones(2), targets=targets)
    assert loss.item() == pytest.approx(sum(by_hand) / 2, abs=1e-6)


def test_a_target_of_one_changes_no_bit():
    margins, weights = torch.randn(100), torch.rand(100)
    assert torch.equal(pairwise_loss(margins, weights, targets=torch.ones(100)), pairwise_loss(margins, weights))
