"""The loss by hand, and that it does not see how pairs were batched."""

import math

import pytest
import torch

from llm2.loss import NO_PAIR, pair_accuracy, pairwise_loss


def test_loss_by_hand():
    """-log sigmoid(0) = log 2; -log sigmoid(log 3) = log(4 / 3)."""
    loss = pairwise_loss(torch.tensor([[0.0, math.log(3)]]), torch.tensor([[1, 1]]))
    assert loss.item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)


def test_padding_does_not_count():
    padded = pairwise_loss(torch.tensor([[0.0, 7.0], [-9.0, 7.0]]), torch.tensor([[1, NO_PAIR], [NO_PAIR, NO_PAIR]]))
    assert padded.item() == pytest.approx(math.log(2))


def test_parts_add_up_to_the_mean_over_all_pairs():
    margins, labels = torch.randn(12), torch.ones(12, dtype=torch.long)
    whole = pairwise_loss(margins, labels)
    parts = sum(pairwise_loss(margins[part], labels[part], 12) for part in (slice(0, 1), slice(1, 7), slice(7, 12)))
    torch.testing.assert_close(parts, whole)


def test_a_batch_without_pairs_is_zero_and_not_nan():
    assert pairwise_loss(torch.zeros(1, 2), torch.full((1, 2), NO_PAIR)).item() == 0


def test_pair_accuracy_counts_a_tie_half():
    assert pair_accuracy(torch.tensor([1.0, -1.0, 0.0, 2.0])) == pytest.approx(2.5 / 4)
