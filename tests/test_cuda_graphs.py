"""CUDA graphs: which forwards are captured, and that decoding with them writes the same tokens."""

import pytest
import torch
from test_decoder import EOS, of_family, prompts

from llm2.decoding import cuda_graphs, scheduler
from llm2.decoding.cuda_graphs import CUDAGraphs, EagerReplay, bucket
from llm2.decoding.decoder import Decoder
from llm2.decoding.kv_cache import SlotCache
from llm2.decoding.sampling import Completion, Guidance, SamplingParams
from llm2.errors import UserError


def test_sizes_are_rounded_up_to_few_buckets():
    assert [bucket(n, 1) for n in (1, 2, 3, 5, 16, 17)] == [1, 2, 4, 8, 16, 32]
    assert sorted({bucket(n, 2) for n in range(1, 65)}) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert all(bucket(n, 4) >= n for n in range(1, 1000))


def test_a_key_is_captured_at_its_second_call():
    graphs, cache, runs = CUDAGraphs(), SlotCache(1), []

    def run(inputs: torch.Tensor) -> torch.Tensor:
        runs.append(inputs)
        return inputs + 1

    for number in range(4):
        assert graphs(cache, "key", run, torch.tensor(number)) == number + 1
    (graph,) = graphs.graphs.values()
    assert runs[1] is runs[2] is runs[3] is graph.inputs and graphs.replays == 3


def test_no_more_graphs_than_the_limit(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    graphs, cache = CUDAGraphs(), SlotCache(1)
    for _ in range(3):
        for key in range(3):
            assert graphs(cache, key, torch.neg, torch.tensor(key)) == -key
    assert [key for _, key in graphs.graphs] == [0, 1]


class PooledReplay:
    """Captures as on a GPU: into the device's pool, which the first capture after a drop begins."""

    def __init__(self, run, inputs, graphs):
        graphs.pool = graphs.pool or object()
        self.run, self.pool = run, graphs.pool

    def __call__(self, inputs):
        return self.run(inputs)


@pytest.mark.parametrize("end", ["grows", "is gone"])
def test_where_one_cache_moves_all_graphs_of_the_device_are_dropped_with_their_pool(end):
    """Two decoders on a GPU, each with a cache of its own, share the pool: no graph may go alone."""
    graphs, one, other = CUDAGraphs(PooledReplay), SlotCache(1), SlotCache(1)

    def call(cache: SlotCache) -> None:
        graphs(cache, "key", torch.neg, torch.tensor(1))

    for cache in (one, other, one, other):
        call(cache)
    pool = graphs.pool
    first = list(graphs.graphs.values())
    assert [graph.pool for graph in first] == [pool, pool] and graphs.knows(one) and graphs.knows(other)
    if end == "grows":
        one.reserve(5)
    else:
        del one, cache
    assert list(graphs.graphs.values()) == first, "no graph goes before the next call"
    call(other)
    assert list(graphs.graphs.values()) == [None] and graphs.pool is None
    call(other)
    assert graphs.pool not in (None, pool) and graphs.replays == 3


def test_a_failed_capture_ends_with_a_sentence():
    def fail(run, inputs, graphs):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")

    graphs, cache = CUDAGraphs(fail), SlotCache(1)
    assert graphs(cache, "key", torch.neg, torch.tensor(1)) == -1
    with pytest.raises(UserError, match=r"failed \(operation not permitted when stream is capturing\).*graphs=False"):
        graphs(cache, "key", torch.neg, torch.tensor(2))


def systems(folder, lora: bool, device: str = "cpu"):
    model, verifier = of_family("llama", folder, lora={"rank": 4} if lora else None)
    return model.to(device), verifier.to(device)


SAMPLING = {"sampling": SamplingParams(temperature=0.8), "eos": EOS, "max_new_tokens": 40}


def tokens(decoder: Decoder, batch: list[list[int]], batch_size: int) -> list[list[int]]:
    seeds = [[index] for index in range(len(batch))]
    return [row.token_ids for (row,) in decoder.decode(batch, seeds=seeds, batch_size=batch_size, **SAMPLING)]


FEW_OR_MANY = [pytest.param(size, marks=pytest.mark.slow) for size in (1, 33)]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("batch_size", [5, *FEW_OR_MANY])
@pytest.mark.parametrize("lora", [False, True])
def test_most_forwards_are_replayed_and_write_the_same_tokens(tmp_path, lora, batch_size, monkeypatch):
    """Sequences come and go, the verifier runs for a few sequences or many: the shapes stay few."""
    replays = []
    replay = EagerReplay.__call__
    monkeypatch.setattr(
        EagerReplay, "__call__", lambda self, inputs: replays.append(inputs.shape) or replay(self, inputs)
    )
    model, verifier = systems(tmp_path, lora)
    guidance, batch = Guidance(verifier=verifier, alpha=0.05, beta=2.0), prompts(7 + batch_size, seed=3)
    plain, recorded = Decoder(model, guidance), Decoder(model, guidance, graphs=True)
    expected = tokens(plain, batch, batch_size)
    assert tokens(recorded, batch, batch_size) == expected
    caches, runners = recorded.state.saved_caches, {recorded.state.lm, recorded.state.verifier}
    replays.clear()
    for runner in runners:
        runner.counts.clear()
    assert tokens(recorded, batch, batch_size) == expected
    assert recorded.state.saved_caches == caches
    forwards = sum(runner.counts["forwards"] for runner in runners)
    assert sum(len(shape) == 2 and shape[0] == 4 for shape in replays) > 0.9 * forwards


def test_decode_steps_are_recorded_before_the_first_prompt_and_read_no_prompts(tmp_path, monkeypatch):
    """Each of System 1's decoding steps is replayed, the first one too, while prompts of many lengths come in."""
    seen, call = [], CUDAGraphs.__call__

    def watched(self, cache, key, run, inputs):
        replays = self.replays
        output = call(self, cache, key, run, inputs)
        seen.append((key, self.replays > replays))
        return output

    monkeypatch.setattr(CUDAGraphs, "__call__", watched)
    model, _ = systems(tmp_path, lora=False)
    batch = [[3 + i % 50] * length for i, length in enumerate((5, 150, 20, 70, 9, 90, 33, 4, 120, 80, 7, 66))]
    decoder = Decoder(model, graphs=True)
    monkeypatch.setattr(
        scheduler.Scheduler, "admit", lambda self, admit=scheduler.Scheduler.admit: seen.append("admit") or admit(self)
    )
    assert tokens(decoder, batch, 4) == tokens(Decoder(model), batch, 4)
    steps = seen[seen.index("admit") :]
    one_token = [replayed for key, replayed in filter(lambda step: step != "admit", steps) if key[0][0].length == 1]
    assert len(one_token) > 40 and all(one_token)
    assert all(len(key[0]) == 1 for key, _ in filter(lambda step: step != "admit", steps)), "no forward mixes them"


def test_two_decodings_under_way_do_not_share_caches(tmp_path):
    model, verifier = systems(tmp_path, lora=False)
    guidance, batch = Guidance(verifier=verifier, alpha=0.05, beta=2.0), prompts(6, seed=3)
    options = {"max_new_tokens": 20, "eos": [], "batch_size": 3, "stop": lambda prompt, _, new: len(new) > 3 * prompt}

    def tokens_of(prompt: int, samples: list[Completion]) -> tuple[int, list[int]]:
        return prompt, samples[0].token_ids

    orders = (batch, batch[::-1])
    expected = [[tokens_of(*pair) for pair in Decoder(model, guidance).stream(order, **options)] for order in orders]
    decoder = Decoder(model, guidance, graphs=True)
    both = list(zip(*(decoder.stream(order, **options) for order in orders), strict=True))
    for call in range(2):
        assert [tokens_of(*pair[call]) for pair in both] == expected[call]


@pytest.mark.long
def test_graphs_are_captured_anew_after_the_cache_grows(tmp_path):
    model, verifier = systems(tmp_path, lora=False)
    guidance = Guidance(verifier=verifier, alpha=0.05, beta=2.0)
    plain, recorded = Decoder(model, guidance), Decoder(model, guidance, graphs=True)
    for length in (10, 300, 20):
        batch = [(prompts(1, seed=5)[0] * 300)[:length]] * 2
        assert tokens(recorded, batch, 2) == tokens(plain, batch, 2)


def test_weights_that_have_moved_are_noticed(tmp_path):
    model, verifier = systems(tmp_path, lora=False)
    decoder = Decoder(model, Guidance(verifier=verifier), graphs=True)
    options = {"max_new_tokens": 3, "eos": []}
    decoder.decode([[5, 6]], **options)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)  # in place: the addresses stay, and nothing holds a copy
    decoder.decode([[5, 6]], **options)
    verifier.double()
    with pytest.raises(UserError, match="weights were moved, replaced or trained after the Decoder was made"):
        decoder.decode([[5, 6]], **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("batch_size", [1, 5, 33])
@pytest.mark.parametrize("lora", [False, True])
def test_graphs_on_a_gpu_write_what_its_eager_forwards_write(tmp_path, lora, batch_size):
    model, verifier = systems(tmp_path, lora, "cuda")
    guidance, batch = Guidance(verifier=verifier, alpha=0.05, beta=2.0), prompts(40, seed=3)
    recorded = Decoder(model, guidance, graphs=True)
    expected = tokens(Decoder(model, guidance), batch, batch_size)
    for _ in range(2):
        assert tokens(recorded, batch, batch_size) == expected
    assert any(recorded.state.lm.graphs.graphs.values())
