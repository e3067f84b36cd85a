"""Memory: what was written and no more, and no more after many decodings than after a few."""

import psutil
import pytest
import torch
from conftest import tiny_system1

from llm2.decoding import kv_cache as cache
from llm2.decoding import scheduler as flight
from llm2.decoding.cuda_graphs import rounded
from llm2.decoding.decoder import Decoder, Guidance, SamplingParams
from llm2.decoding.kv_cache import SlotCache
from llm2.decoding.model_runner import PackedLinear

SLOTS, HEADS, WIDTH = 256, 4, 32
COLUMN = HEADS * WIDTH * 4 * 2  # bytes of a column, keys and values


def resident() -> int:
    """Bytes of this process alone: the pages of libraries come and go as the system likes."""
    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)


@pytest.fixture
def guidance(verifier) -> Guidance:
    return Guidance(verifier=verifier)


def test_a_long_row_takes_memory_for_itself_alone():
    before, columns = resident(), 2_048  # for all slots 512 MiB
    slots = SlotCache(SLOTS, columns)
    keys, values = slots.layer(0, torch.zeros(1, HEADS, 1, WIDTH))
    for buffer in (keys, values):
        buffer[:, :, :32] = 1
        buffer[7] = 1
        assert buffer[:, :, :64].sum() == (32 * SLOTS + 32) * HEADS * WIDTH  # what was not written is zero
    written = COLUMN * (32 * SLOTS + columns)  # 10 MiB
    assert resident() - before < 4 * written
    del slots, keys, values, buffer
    assert resident() - before < written


def test_a_cache_that_grows_keeps_what_it_holds():
    slots = SlotCache(3)
    slots.reserve(5)
    like = torch.zeros(1, 2, 1, 4, dtype=torch.bfloat16)
    keys, _ = slots.layer(0, like)
    keys.copy_(torch.arange(keys.numel()).view_as(keys))
    slots.reserve(1_000)
    grown, values = slots.layer(0, like)
    assert grown.shape == values.shape == (3, 2, slots.columns, 4) and slots.columns >= 1_000
    assert grown[:, :, : keys.shape[2]].equal(keys) and not grown[:, :, keys.shape[2] :].any() and not values.any()


@pytest.mark.parametrize("guided", [False, True])
def test_the_buffers_of_a_decoding_are_made_once(system1, guidance, guided, monkeypatch):
    """However long its rows get: what would grow is held twice for a while, and leaves holes of every size behind."""
    made = []
    zeros = cache._zeros
    monkeypatch.setattr(cache, "_zeros", lambda shape, like: made.append(shape) or zeros(shape, like))
    monkeypatch.setattr(flight, "IN_PLACE", 10**9)
    prompts = [[3] * length for length in (2, 90, 200)]
    decoder = Decoder(system1, guidance if guided else None)
    rows = decoder.decode(prompts, max_new_tokens=150, eos=[], sampling=SamplingParams(), seeds=[[1], [2, 3], [4]])
    assert all(len(row.token_ids) == 150 for own in rows for row in own)
    layers = system1.config.num_hidden_layers
    assert len(made) == (4 if guided else 2) * layers


def test_kernels_of_the_packed_head_are_few():
    """oneDNN keeps one a number of tokens: 256 numbers were 140 MiB."""
    sizes = [rounded(count, 8) for count in range(1, 1_025)]
    assert all(count <= size <= count * 9 / 8 for count, size in enumerate(sizes, start=1))
    assert sizes[:16] == list(range(1, 17)) and len(set(sizes)) == 16 + 8 * 6
    weight = torch.randn(640, 160)
    head, states = PackedLinear(weight), torch.randn(1, 256, 160)
    before = resident()
    for count in range(1, 257):
        torch.testing.assert_close(head(states[:, :count]), states[:, :count] @ weight.T, rtol=1e-4, atol=1e-4)
    assert resident() - before < 60 * 2**20


def test_one_long_row_does_not_raise_the_peak_of_a_decoding():
    """The longest row of a long run is an extreme of many: only its own slot pays for it."""
    decoder = Decoder(tiny_system1(num_key_value_heads=4, head_dim=64))
    short = [[3 + i % 50] * 20 for i in range(64)]

    def peak(prompts: list[list[int]]) -> int:
        options = {"eos": [], "sampling": SamplingParams(), "seeds": [[i] for i in range(len(prompts))]}
        return max(resident() for _ in decoder.stream(prompts, max_new_tokens=4, batch_size=64, **options))

    peak(short)  # what is compiled or cached once
    peak([[3] * 1_000])
    assert peak([*short[1:], [3] * 1_000]) < peak(short) + 40 * 2**20  # in all slots they would be 280 MiB
