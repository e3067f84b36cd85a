"""A cache takes memory for what is stored, and no more after many decodings than after a few."""

import psutil
import pytest
import torch
from conftest import tiny_system1
from test_decoder import use_padded_batches

from llm2.decoding import scheduler
from llm2.decoding.cuda_graphs import bucket
from llm2.decoding.decoder import Decoder
from llm2.decoding.kv_cache import SlotCache
from llm2.decoding.linear import OneDNNLinear
from llm2.decoding.sampling import Guidance, SamplingParams

SLOTS, HEADS, WIDTH = 256, 4, 32
POSITION_BYTES = HEADS * WIDTH * 4 * 2  # keys and values of one position


def resident() -> int:
    """Bytes of this process alone, without pages of shared libraries."""
    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)


@pytest.fixture
def guidance(verifier) -> Guidance:
    return Guidance(verifier=verifier)


def test_a_long_sequence_takes_memory_for_its_own_slot_alone():
    before, capacity = resident(), 2_048  # for all slots 512 MiB
    cache = SlotCache(SLOTS, capacity)
    keys, values = cache.layer(0, torch.zeros(1, HEADS, 1, WIDTH))
    for buffer in (keys, values):
        buffer[:, :, :32] = 1
        buffer[7] = 1
        assert buffer[:, :, :64].sum() == (32 * SLOTS + 32) * HEADS * WIDTH  # unwritten positions are zero
    written = POSITION_BYTES * (32 * SLOTS + capacity)  # 10 MiB
    assert resident() - before < 4 * written
    del cache, keys, values, buffer
    assert resident() - before < written


def test_released_slots_take_no_memory_and_the_others_keep_what_they_hold():
    cache = SlotCache(5, capacity=4_096)
    keys, _ = cache.layer(0, torch.zeros(1, HEADS, 1, WIDTH))
    before = resident()
    keys.fill_(1)
    cache.release(1, 3)
    assert resident() - before < 3.5 / 5 * keys.nbytes
    assert keys[[0, 3, 4]].eq(1).all() and keys[1:3].isfinite().all()
    cache.release(3, 3)
    cache.reserve(5_000)
    cache.release(0, 5)
    assert not cache.layer(0, keys)[0].any() and keys[0].eq(1).all()


def test_a_cache_that_grows_keeps_what_it_holds():
    cache = SlotCache(3)
    cache.reserve(5)
    like = torch.zeros(1, 2, 1, 4, dtype=torch.bfloat16)
    keys, _ = cache.layer(0, like)
    keys.copy_(torch.arange(keys.numel()).view_as(keys))
    cache.reserve(1_000)
    grown, values = cache.layer(0, like)
    assert grown.shape == values.shape == (3, 2, cache.capacity, 4) and cache.capacity >= 1_000
    assert grown[:, :, : keys.shape[2]].equal(keys) and not grown[:, :, keys.shape[2] :].any() and not values.any()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_the_buffers_of_a_decoding_are_allocated_once(system1, guidance, guided, padded, monkeypatch):
    """A buffer that grows is held twice for a while, fragments the heap, and drops all CUDA graphs of its device."""
    if padded:
        use_padded_batches(monkeypatch)
    allocated = []
    zeros = SlotCache._zeros
    monkeypatch.setattr(
        SlotCache, "_zeros", lambda self, shape, like: allocated.append(shape) or zeros(self, shape, like)
    )
    monkeypatch.setattr(scheduler, "MIN_IN_PLACE_TOKENS", 10**9)
    prompts = [[3] * length for length in (2, 90, 200)]
    decoder = Decoder(system1, guidance if guided else None)
    completions = decoder.decode(
        prompts, max_new_tokens=150, eos=[], sampling=SamplingParams(), seeds=[[1], [2, 3], [4]]
    )
    assert all(len(row.token_ids) == 150 for samples in completions for row in samples)
    layers = system1.config.num_hidden_layers
    assert len(allocated) == (4 if guided else 2) * layers


def test_the_onednn_head_needs_few_kernels():
    """oneDNN caches one per number of tokens; 256 of them take 140 MiB."""
    sizes = [bucket(count, 8) for count in range(1, 1_025)]
    assert all(count <= size <= count * 9 / 8 for count, size in enumerate(sizes, start=1))
    assert sizes[:16] == list(range(1, 17)) and len(set(sizes)) == 16 + 8 * 6
    linear = torch.nn.Linear(160, 640, bias=False)
    head, states = OneDNNLinear(linear), torch.randn(1, 256, 160)
    before = resident()
    for count in range(1, 257):
        torch.testing.assert_close(head(states[:, :count]), linear(states[:, :count]), rtol=1e-4, atol=1e-4)
    assert resident() - before < 60 * 2**20


def test_one_long_sequence_does_not_raise_the_peak_of_a_decoding():
    """Only its own slot grows."""
    decoder = Decoder(tiny_system1(num_key_value_heads=4, head_dim=64))
    short = [[3 + i % 50] * 20 for i in range(64)]

    def peak(prompts: list[list[int]]) -> int:
        options = {"eos": [], "sampling": SamplingParams(), "seeds": [[i] for i in range(len(prompts))]}
        return max(resident() for _ in decoder.stream(prompts, max_new_tokens=4, batch_size=64, **options))

    peak(short)  # compiles and caches
    peak([[3] * 1_000])
    assert peak([*short[1:], [3] * 1_000]) < peak(short) + 40 * 2**20  # in all slots they would be 280 MiB
