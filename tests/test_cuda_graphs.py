"""CUDA graphs: which forwards are captured, and that decoding with them writes the same tokens."""

import pytest
import torch
from test_decoder import EOS, of_family, prompts

from llm2.decoding import cuda_graphs
from llm2.decoding.cuda_graphs import CUDAGraphRunner, EagerReplay, bucket
from llm2.decoding.decoder import Decoder
from llm2.decoding.sampling import Completion, Guidance, SamplingParams

CPU = torch.device("cpu")


def test_sizes_are_rounded_up_to_few_buckets():
    assert [bucket(n, 1) for n in (1, 2, 3, 5, 16, 17)] == [1, 2, 4, 8, 16, 32]
    assert sorted({bucket(n, 2) for n in range(1, 65)}) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert all(bucket(n, 4) >= n for n in range(1, 1000))


def test_a_key_is_captured_at_its_second_call():
    runner, runs = CUDAGraphRunner(CPU), []

    def run(inputs: torch.Tensor) -> torch.Tensor:
        runs.append(inputs)
        return inputs + 1

    for number in range(4):
        assert runner("key", run, torch.tensor(number)) == number + 1
    assert runs[1] is runs[2] is runs[3] is runner.graphs["key"].inputs
    runner.invalidate_if_moved("elsewhere")
    assert not runner.graphs


def test_no_more_graphs_than_the_limit(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    runner = CUDAGraphRunner(CPU)
    for _ in range(3):
        for key in range(3):
            assert runner(key, torch.neg, torch.tensor(key)) == -key
    assert set(runner.graphs) == {0, 1}


def test_a_failed_capture_falls_back_to_eager_forwards():
    def fail(run, inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    runner = CUDAGraphRunner(CPU)
    runner.capture = fail
    assert runner("key", torch.neg, torch.tensor(1)) == -1
    with pytest.warns(UserWarning, match="without CUDA graphs.*not permitted"):
        assert runner("key", torch.neg, torch.tensor(2)) == -2
    assert runner("key", torch.neg, torch.tensor(3)) == -3
    assert not runner.graphs


def systems(folder, lora: bool, device: str = "cpu"):
    model, verifier = of_family("llama", folder, lora={"rank": 4} if lora else None)
    return model.to(device), verifier.to(device)


SAMPLING = {"sampling": SamplingParams(temperature=0.8), "eos": EOS, "max_new_tokens": 40}


def tokens(decoder: Decoder, batch: list[list[int]], batch_size: int) -> list[list[int]]:
    seeds = [[index] for index in range(len(batch))]
    return [row.token_ids for (row,) in decoder.decode(batch, seeds=seeds, batch_size=batch_size, **SAMPLING)]


@pytest.mark.parametrize("batch_size", [1, 5, 33])
@pytest.mark.parametrize("lora", [False, True])
def test_most_forwards_are_replayed_and_write_the_same_tokens(tmp_path, lora, batch_size, monkeypatch):
    """Sequences come and go, caches grow, the verifier runs for a few sequences or many: the shapes stay few."""
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
    caches = recorded.runners.saved_caches
    replays.clear()
    recorded.counts.clear()
    assert tokens(recorded, batch, batch_size) == expected
    assert recorded.runners.saved_caches is caches
    forwards = recorded.counts["system1_forwards"] + (0 if lora else recorded.counts["system2_forwards"])
    assert sum(len(shape) == 2 and shape[0] == 4 for shape in replays) > 0.6 * forwards


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


def test_graphs_are_captured_anew_after_the_cache_grows(tmp_path):
    model, verifier = systems(tmp_path, lora=False)
    guidance = Guidance(verifier=verifier, alpha=0.05, beta=2.0)
    plain, recorded = Decoder(model, guidance), Decoder(model, guidance, graphs=True)
    for length in (10, 300, 20):
        batch = [(prompts(1, seed=5)[0] * 300)[:length]] * 2
        assert tokens(recorded, batch, 2) == tokens(plain, batch, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("batch_size", [1, 5, 33])
@pytest.mark.parametrize("lora", [False, True])
def test_graphs_on_a_gpu_write_what_its_eager_forwards_write(tmp_path, lora, batch_size, recwarn):
    model, verifier = systems(tmp_path, lora, "cuda")
    guidance, batch = Guidance(verifier=verifier, alpha=0.05, beta=2.0), prompts(40, seed=3)
    recorded = Decoder(model, guidance, graphs=True)
    expected = tokens(Decoder(model, guidance), batch, batch_size)
    for _ in range(2):
        assert tokens(recorded, batch, batch_size) == expected
    assert any(recorded.runners.lm.graphs.graphs.values())
    assert not [warning for warning in recwarn if "CUDA graphs" in str(warning.message)]
