"""Seeds depend on names alone; their uniforms are uniform and independent enough to sample with."""

import torch
from scipy.stats import kstest

from llm2.common.seeds import row_seed, uniforms


def test_splitmix64_reference_value():
    """The first output of SplitMix64 for seed 0 is 0xE220A8397B1DCDAF; its top 24 bits are 0xE220A8."""
    assert uniforms(torch.tensor([0]), torch.tensor([0])).item() == 0xE220A8 / 2**24


def test_the_same_names_give_the_same_seed_on_every_machine():
    assert row_seed(0, "test-1", 3) == row_seed(0, "test-1", 3) != row_seed(0, "test-1", 4)
    assert row_seed("a", "b") != row_seed("ab")
    assert row_seed(1, 2, 3) == 5809300636878265108


def test_uniforms_are_uniform_over_rows_and_over_steps():
    seeds = torch.tensor([row_seed("row", i) for i in range(5_000)])
    first, second = (uniforms(seeds, torch.full_like(seeds, step)) for step in (0, 1))
    assert kstest(first.numpy(), "uniform").pvalue > 0.001
    assert kstest(uniforms(seeds[:1].expand(5_000), torch.arange(5_000)).numpy(), "uniform").pvalue > 0.001
    neighbours = torch.corrcoef(torch.stack([first, second]))[0, 1]
    assert abs(neighbours.item()) < 0.05
