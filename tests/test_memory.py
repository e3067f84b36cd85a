"""Decoding states its memory, takes the batch that fits, and goes on with fewer sequences where memory runs out."""

import logging

import pytest
import torch
from conftest import tiny_system1
from test_decoder import EOS, FAMILIES, of_family, prompts, use_padded_batches

from llm2.decoding import memory, scheduler
from llm2.decoding.decoder import Decoder
from llm2.decoding.memory import plan_memory, position_bytes
from llm2.decoding.model_runner import ModelRunner
from llm2.decoding.sampling import Completion, Guidance, SamplingParams
from llm2.decoding.scheduler import Scheduler

CPU = torch.device("cpu")


# gpt_neox ignores what the other families' configs set
@pytest.mark.parametrize("family", sorted({family for family, _ in FAMILIES} - {"gpt_neox"}))
def test_the_bytes_of_a_token_are_those_that_its_cache_takes(family, tmp_path):
    model, verifier = of_family(family, tmp_path)
    decoder = Decoder(model, Guidance(verifier=verifier), graphs=True)
    decoder.decode([[5, 6, 7]], max_new_tokens=4, eos=[])
    plan, *caches = decoder.state.saved_caches
    for cache in caches:
        allocated = sum(buffer.nbytes for buffers in cache.layers.values() for buffer in buffers)
        assert allocated == position_bytes(model.config, model.dtype) * plan.capacity * (plan.rows + 1)


def test_the_batch_that_fits_is_chosen_and_a_given_one_gets_shorter_caches(monkeypatch):
    """A token takes 2 layers x (keys and values) x 2 heads x 8 x 4 bytes = 256, the logits of a row 4 x 4 x 64."""
    body = tiny_system1().base_model
    assert position_bytes(body.config, body.dtype) == 256
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10**6)
    plan = plan_memory([body, body], CPU, "auto", 1_000, 99)  # 512 bytes a position, 50,688 a slot
    assert (plan.rows, plan.capacity) == (14, 99)  # 800,000 = 15 slots (one of them for prefixes) and 14 rows of logits
    assert plan.cache_bytes == 15 * 50_688 and plan.free_bytes == 10**6
    assert str(plan) == "0.00 GB of caches for 14 sequences of 99 tokens, 0.00 GB free before"
    given = plan_memory([body, body], CPU, 30, 1_000, 99)
    assert given.rows == 30 and 0 < given.cache_bytes < 800_000 and given.capacity < 99
    assert plan_memory([body], CPU, "auto", 3, 99).rows == 3
    assert plan_memory([body], CPU, "auto", 1_000, 10**9).rows == 1


def test_memory_is_stated_before_decoding_starts(system1, verifier, monkeypatch, caplog):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10**9)
    decoder = Decoder(system1, Guidance(verifier=verifier))
    with caplog.at_level(logging.INFO, "llm2"):
        stream = decoder.stream(prompts(4), max_new_tokens=4, eos=EOS, batch_size="auto")
        first = next(stream)
    (statement,) = caplog.messages
    assert statement.startswith("memory: 0.00 GB of weights, 0.00 GB of caches for 4 sequences of") and first
    list(stream)
    assert decoder.decode(prompts(4), max_new_tokens=4, eos=EOS, batch_size="auto") and len(caplog.messages) == 1


@pytest.fixture(params=[(layout, lora) for layout in ("varlen", "padded", "graphs") for lora in (False, True)], ids=str)
def case(request, tmp_path, monkeypatch):
    """Both systems and a function that makes their decoder; prompts share a prefix, on a CPU in place."""
    layout, lora = request.param
    if layout == "padded":
        use_padded_batches(monkeypatch)
    monkeypatch.setattr(scheduler, "MIN_IN_PLACE_TOKENS", 0)
    model, verifier = of_family("llama", tmp_path, lora={"rank": 4} if lora else None)
    guidance = Guidance(verifier=verifier, alpha=0.05, beta=2.0)
    return lambda: Decoder(model, guidance, graphs=layout == "graphs")


def texts(decoder: Decoder, **options) -> list[list[Completion]]:
    shared = [3 + i % 50 for i in range(40)]
    batch = [[*shared, 7], *prompts(3, seed=3), [*shared, 8, 9]]
    seeds = [[10 * prompt + sample for sample in range(3)] for prompt in range(len(batch))]
    settings = {"max_new_tokens": 15, "eos": EOS, "sampling": SamplingParams(), "seeds": seeds, "batch_size": 8}
    return decoder.decode(batch, **settings, trace=True, **options)


@pytest.mark.one_in(10)
@pytest.mark.parametrize("failing", [0, 1, 2, 9, 20])
def test_where_memory_runs_out_half_the_sequences_go_on_and_write_the_same(case, failing, monkeypatch):
    """The error comes in the middle of a step: in System 1's forward, or the verifier's, or a prefix's."""
    expected = texts(case())
    decoder, forward, calls, in_flight, told = case(), ModelRunner.forward, [], [], []

    def fails_once(self, cache, chunks, verifier_chunks=()):
        calls.append(len({chunk.slot for chunk in chunks}))
        if len(calls) == failing + 1:
            in_flight.append(cache)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, cache, chunks, verifier_chunks)

    monkeypatch.setattr(ModelRunner, "record", lambda *unused: None)
    monkeypatch.setattr(ModelRunner, "forward", fails_once)
    with pytest.warns(UserWarning, match="memory ran out with .* decoding goes on with") as warned:
        found = texts(decoder, on_token=lambda *token: told.append(token))
    assert len([warning for warning in warned if "memory ran out" in str(warning.message)]) == 1
    for samples, others in zip(found, expected, strict=True):
        for sample, other in zip(samples, others, strict=True):
            assert sample.token_ids == other.token_ids and sample.num_verifier_calls == other.num_verifier_calls
            assert [token.candidates for token in sample.trace] == [token.candidates for token in other.trace]
    assert len(told) == sum(len(sample.token_ids) for samples in found for sample in samples), "none is told twice"
    assert max(calls[failing + 2 :]) <= 5  # 4 sequences and a prefix


@pytest.mark.parametrize("failing", [1, 2, 5, 9])
def test_samples_that_share_a_row_go_on_alone_where_memory_runs_out(system1, failing, monkeypatch):
    batch, forward, calls = prompts(3), ModelRunner.forward, []
    seeds = [[10 * prompt + sample for sample in range(8)] for prompt in range(len(batch))]
    options = {"max_new_tokens": 12, "eos": EOS, "sampling": SamplingParams(temperature=0.4), "seeds": seeds}
    expected = [[row.token_ids for row in rows] for rows in Decoder(system1).decode(batch, **options)]

    def fails_once(*arguments):
        calls.append(arguments)
        if len(calls) == failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(*arguments)

    monkeypatch.setattr(ModelRunner, "forward", fails_once)
    with pytest.warns(UserWarning, match="memory ran out"):
        found = Decoder(system1).decode(batch, **options)
    assert [[row.token_ids for row in rows] for rows in found] == expected


def test_one_sequence_that_does_not_fit_ends_the_decoding(system1, monkeypatch):
    def fails(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ModelRunner, "forward", fails)
    with pytest.warns(UserWarning) as warned, pytest.raises(torch.OutOfMemoryError):
        Decoder(system1).decode(prompts(8), max_new_tokens=4, eos=EOS)
    assert [str(warning.message).split("with ")[2].split()[0] for warning in warned] == ["4", "2", "1"]


def test_a_sequence_that_was_finished_when_memory_ran_out_frees_no_slot_of_the_next_cache(
    system1, verifier, monkeypatch
):
    """Two sequences would share it, and each read the other's tokens."""
    options = {"max_new_tokens": 12, "eos": range(0, 64, 6), "batch_size": 8}
    batch, guidance = prompts(24), Guidance(verifier=verifier, alpha=0.02, beta=3.0)
    expected = [row.token_ids for (row,) in Decoder(system1, guidance).decode(batch, **options)]
    decoder, seen, failed = Decoder(system1, guidance), [], []
    forward, step = ModelRunner.forward, Scheduler.step
    monkeypatch.setattr(Scheduler, "step", lambda self: seen.append(self) or step(self))

    def fails(self, *arguments):
        if self is decoder.state.lm and not failed and any(sequence.done for sequence in seen[-1].running):
            failed.append(self)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *arguments)

    monkeypatch.setattr(ModelRunner, "forward", fails)
    with pytest.warns(UserWarning, match="memory ran out"):
        found = [row.token_ids for (row,) in decoder.decode(batch, **options)]
    free = seen[-1].system2.free_slots
    assert failed and found == expected and len(set(free)) == len(free) == 4 + seen[-1].plan.prefixes
