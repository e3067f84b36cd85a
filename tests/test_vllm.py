"""Guidance for vLLM, without vLLM: what its core writes under random schedules is what our decoder writes."""

import random

import pytest
import torch
from conftest import VOCABULARY, tiny_system1

from llm2.config import GuidanceConfig
from llm2.decoding.decoder import Decoder
from llm2.decoding.sampling import Guidance
from llm2.verifier.model import ProcessVerifier
from llm2.vllm import core
from llm2.vllm.core import VerifierBatch

EOS, NEW = [1], 12
GUIDANCE = [
    GuidanceConfig(alpha=0.02, beta=3.0),
    GuidanceConfig(alpha=0.1, beta=1.5),
    GuidanceConfig(alpha=0.001, top_k=3),
]


def prompts(count: int) -> list[list[int]]:
    """Prompts of unequal length; many begin alike, as those of samples and of few-shot examples do."""
    generator = random.Random(count)
    shared = [generator.randrange(3, VOCABULARY) for _ in range(40)]
    tails = [[generator.randrange(3, VOCABULARY) for _ in range(generator.randrange(1, 12))] for _ in range(count)]
    return [shared[: generator.choice([0, 0, 20, 40])] + tail for tail in tails]


def written_by_decoder(system1, verifier, prompt, guidance) -> list[int]:
    guidance = guidance and Guidance(verifier=verifier, **guidance.guidance())
    ((completion,),) = Decoder(system1, guidance).decode([prompt], max_new_tokens=NEW, eos=EOS)
    return completion.token_ids


class FakeEngine:
    """Batches of logits in random order, of sequences that join, leave, are preempted and come back."""

    def __init__(self, system1, batch: VerifierBatch, requests, seed: int) -> None:
        self.system1, self.batch, self.random = system1, batch, random.Random(seed)
        self.waiting = [(prompt, guidance, []) for prompt, guidance in requests]
        self.running: list[tuple[tuple, object]] = []
        self.preemptions = 0

    def run(self) -> None:
        while self.waiting or self.running:
            self.admit()
            self.step()

    def admit(self) -> None:
        while self.waiting and self.batch.free_slots and self.random.random() < 0.7:
            request = self.waiting.pop(0)
            prompt, guidance, written = request
            self.running.append((request, guidance and self.batch.join(guidance, [*prompt, *written])))

    @torch.inference_mode()
    def step(self) -> None:
        self.random.shuffle(self.running)
        if not self.running:
            return
        rows, logits, in_prompt = [], [], set()
        for row, ((prompt, _, written), sequence) in enumerate(self.running):
            ids = prompt + written
            if self.random.random() < 0.2:  # a part of the prompt only: its logits are of no use
                in_prompt.add(row)
                ids = ids[: self.random.randrange(1, len(ids) + 1)]
            logits.append(self.system1(torch.tensor([ids])).logits[0, -1])
            if sequence is not None:
                sequence.token_ids.extend((prompt + written)[len(sequence.token_ids) :])
                rows.append((row, sequence))
        logits = torch.stack(logits)
        before = logits.clone()
        self.batch.guide(logits, rows)
        guided = {row for row, _ in rows}
        left = []
        for row, ((prompt, guidance, written), _) in enumerate(self.running):
            if row not in guided:
                assert torch.equal(logits[row], before[row])
            if row not in in_prompt:
                written.append(logits[row].argmax().item())
            if written and (written[-1] in EOS or len(written) == NEW):
                left.append(row)
            elif self.random.random() < 0.1:
                self.preemptions += 1
                self.waiting.append((prompt, guidance, written))
                left.append(row)
        for row in left:
            if self.running[row][1] is not None:
                self.batch.leave(self.running[row][1])
        self.running = [entry for row, entry in enumerate(self.running) if row not in left]


@pytest.fixture(scope="module", params=["candidate", "prefix"])
def verifier(request, tmp_path_factory) -> ProcessVerifier:
    """Of both kinds with all layers, whose scores are large enough to change choices."""
    folder = tmp_path_factory.mktemp("system1")
    tiny_system1(1).save_pretrained(folder)
    torch.manual_seed(1)
    return ProcessVerifier.from_system1(str(folder), score=request.param, local_files_only=True).eval()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limits", [(8_192, 64), (20, 4)], ids=["roomy", "small forwards"])
def test_random_schedules_write_what_the_decoder_writes(system1, verifier, seed, limits, monkeypatch):
    monkeypatch.setattr(core, "MAX_BRANCHES", limits[1])
    batch = VerifierBatch(verifier, num_slots=5, max_len=64, max_tokens=limits[0])
    choices = [None, *GUIDANCE]
    requests = [(prompt, choices[index % 4]) for index, prompt in enumerate(prompts(24))]
    engine = FakeEngine(system1, batch, requests, seed)
    finished = engine.waiting[:]
    engine.run()
    expected = [written_by_decoder(system1, verifier, *request) for request in requests]
    assert [written for _, _, written in finished] == expected
    assert engine.preemptions > 3 and len(batch.free_slots) == 5
    plain = [written_by_decoder(system1, None, prompt, None) for prompt, _ in requests]
    assert sum(a != b for a, b in zip(plain, expected, strict=True)) > 6, "guidance must change choices"


def test_a_shared_prefix_is_read_once(system1, verifier):
    prompt, guidance = prompts(3)[0][:0] + list(range(3, 43)), GUIDANCE[0]
    batch = VerifierBatch(verifier, num_slots=4, max_len=64)
    logits = torch.zeros(4, VOCABULARY)
    rows = [(row, batch.join(guidance, [*prompt, 50 + row])) for row in range(4)]
    batch.guide(logits, rows)
    branches = VOCABULARY if verifier.config.score == "candidate" else 0  # flat logits: every token is a candidate
    assert batch.tokens_read == 40 + 4 * (1 + branches)
    alone = VerifierBatch(verifier, num_slots=1, max_len=64)
    for row in range(4):
        expected = torch.zeros(1, VOCABULARY)
        sequence = alone.join(guidance, [*prompt, 50 + row])
        alone.guide(expected, [(0, sequence)])
        alone.leave(sequence)
        assert logits[row].tolist() == pytest.approx(expected[0].tolist(), abs=1e-4)
    assert alone.tokens_read == 41 + 3 + 4 * branches  # a slot that is free still holds the prefix


def test_nothing_is_allocated_after_the_start(system1, verifier):
    batch = VerifierBatch(verifier, num_slots=2, max_len=30)
    buffers = [buffer.data_ptr() for layer in batch.cache.layers.values() for buffer in layer]
    assert len(buffers) == 4
    sequence = batch.join(GUIDANCE[0], range(3, 33))
    batch.guide(torch.zeros(1, VOCABULARY), [(0, sequence)])
    assert [buffer.data_ptr() for layer in batch.cache.layers.values() for buffer in layer] == buffers
