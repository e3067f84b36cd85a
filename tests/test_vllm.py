"""Guidance for vLLM, without vLLM: what its core writes under random schedules is what our decoder writes."""

import asyncio
import itertools
import json
import logging
import math
import random
import shlex
import shutil
import sys
import tomllib
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import make_dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, tiny_system1
from transformers import LogitsProcessor

from benchmarks.configs import RolloutBenchmark, ServedBenchmark
from llm2.common.config_file import write_config
from llm2.common.loading import load_tokenizer
from llm2.config import EvaluateConfig, ExploreConfig, GuidanceConfig, Mode, ServeConfig, TrainConfig, VerifierSpec
from llm2.decoding.candidates import plausible
from llm2.decoding.decoder import Decoder
from llm2.decoding.model_runner import ModelRunner
from llm2.decoding.processing import logits_fn
from llm2.decoding.sampling import Guidance
from llm2.errors import UserError
from llm2.evaluation.tracing import recompute_trace
from llm2.evaluation.vllm_decoder import VllmDecoder
from llm2.verifier.heads import fingerprint
from llm2.verifier.load import verifier_config
from llm2.verifier.model import ProcessVerifier
from llm2.vllm import core, proof, serve
from llm2.vllm.backend import Answer
from llm2.vllm.checks import check_engine, describe_memory
from llm2.vllm.core import GuidedBatch, open_verifier
from llm2.vllm.engine import engine_options
from llm2.vllm.prefix_head import HeadBatch, check_fingerprint, load_head
from llm2.vllm.settings import engine_settings, guidance_args, request_guidance

EOS, NEW, SLOTS = [1], 12, 5
GUIDANCE = [
    GuidanceConfig(alpha=0.02, beta=3.0),
    GuidanceConfig(alpha=0.1, beta=1.5),
    GuidanceConfig(alpha=0.001, top_k=3),
]


class Entry(NamedTuple):
    prompt: list[int]
    guidance: GuidanceConfig | None
    written: list[int]
    handle: list  # what the engine knows it by, while it runs


def prompts(count: int) -> list[list[int]]:
    """Prompts of unequal length; many begin alike, as those of samples and of few-shot examples do."""
    generator = random.Random(count)
    shared = [generator.randrange(3, VOCABULARY) for _ in range(40)]
    tails = [[generator.randrange(3, VOCABULARY) for _ in range(generator.randrange(1, 12))] for _ in range(count)]
    return [shared[: generator.choice([0, 0, 20, 40])] + tail for tail in tails]


def written_by_decoder(system1, verifier, prompt, guidance) -> list[int]:
    return _written_by_decoder(system1, verifier, tuple(prompt), guidance)


@cache  # many tests compare with the same completions
def _written_by_decoder(system1, verifier, prompt, guidance) -> list[int]:
    guidance = guidance and Guidance(verifier=verifier, **guidance.guidance_kwargs())
    ((completion,),) = Decoder(system1, guidance).decode([list(prompt)], max_new_tokens=NEW, eos=EOS)
    return completion.token_ids


def batch_of(verifier, num_slots: int = SLOTS, max_len: int = 64, **limits) -> GuidedBatch:
    return GuidedBatch(open_verifier(verifier, num_slots, max_len, **limits))


class FakeEngine:
    """Batches of logits in random order, of sequences that join, leave, are preempted and come back."""

    processes = False  # whether the logits of plain requests change too

    def __init__(self, system1, batch: GuidedBatch, requests, seed: int) -> None:
        self.system1, self.batch, self.random = system1, batch, random.Random(seed)
        self.waiting = [Entry(prompt, guidance, [], []) for prompt, guidance in requests]
        self.running: list[Entry] = []
        self.preemptions = 0

    def run(self) -> None:
        while self.waiting or self.running:
            while self.waiting and len(self.running) < SLOTS and self.random.random() < 0.7:
                entry = self.waiting.pop(0)
                self.running.append(entry)
                self.join(entry)
            if self.running:
                self.step()

    def step(self) -> None:
        self.order()
        logits, partial = [], set()
        for row, (prompt, _, written, _) in enumerate(self.running):
            ids = prompt + written
            if len(ids) > 1 and self.random.random() < 0.2:  # a part of the prompt only: its logits are of no use
                partial.add(row)
                ids = ids[: self.random.randrange(1, len(ids))]
            with torch.inference_mode():
                logits.append(self.system1(torch.tensor([ids])).logits[0, -1])
        logits = torch.stack(logits)
        before = logits.clone()
        self.apply(logits, partial)
        left = []
        for row, entry in enumerate(self.running):
            if entry.guidance is None and not self.processes:
                assert torch.equal(logits[row], before[row])
            if row not in partial:
                entry.written.append(logits[row].argmax().item())
            finished = entry.written and (entry.written[-1] in EOS or len(entry.written) == NEW)
            if not finished and self.random.random() < 0.1:
                self.preemptions += 1
                self.waiting.append(entry)
                left.append(entry)
            elif finished:
                left.append(entry)
        for entry in left:
            self.leave(entry)

    # What the core's caller does; the engines below do it through vLLM's interfaces.

    def join(self, entry: Entry) -> None:
        if entry.guidance is not None:
            entry.handle.append(self.batch.join(entry.guidance, [*entry.prompt, *entry.written]))

    def order(self) -> None:
        self.random.shuffle(self.running)

    def apply(self, logits: torch.Tensor, partial: set[int]) -> None:
        rows = [(row, entry.handle[-1]) for row, entry in enumerate(self.running) if entry.guidance]
        for row, sequence in rows:
            ids = self.running[row].prompt + self.running[row].written
            self.batch.system2.commit(sequence.handle, ids[len(sequence.handle.token_ids) :])
        self.batch.guide(logits, rows)

    def leave(self, entry: Entry) -> None:
        self.running.remove(entry)
        if entry.guidance is not None:
            self.batch.leave(entry.handle.pop())


class V1Engine(FakeEngine):
    """Tells the processor what was removed, added and moved, as vLLM's first model runner does."""

    def __init__(self, system1, processor, requests, seed: int) -> None:
        super().__init__(system1, processor.batch, requests, seed)
        self.processor, self.rows, self.removed, self.new = processor, [], [], []

    def join(self, entry: Entry) -> None:
        self.new.append(entry)

    def order(self) -> None:
        added, moved, rows = [], [], self.rows
        self.removed.sort()
        for entry in self.new:
            row = self.removed.pop(0) if self.removed else len(rows)
            rows[row : row + 1] = [entry]
            params = SimpleNamespace(extra_args=guidance_args(entry.guidance))
            added.append((row, params, entry.prompt, entry.written))
        while self.removed:  # the last rows move into the gaps
            while rows and rows[-1] is None:
                rows.pop()
            if self.removed[0] >= len(rows):
                break
            gap = self.removed.pop(0)
            moved.append((len(rows) - 1, gap, "one way"))
            rows[gap] = rows.pop()
        if len(rows) > 1 and self.random.random() < 0.5:
            a, b = self.random.sample(range(len(rows)), 2)
            rows[a], rows[b] = rows[b], rows[a]
            moved.append((a, b, "swap"))
        update = SimpleNamespace(removed=self.removed[::-1], added=added, moved=moved)
        self.processor.update_state(update if self.removed or added or moved else None)
        self.running, self.new, self.removed = list(rows), [], []

    def apply(self, logits: torch.Tensor, partial: set[int]) -> None:
        assert self.processor.apply(logits) is logits

    def leave(self, entry: Entry) -> None:
        self.running.remove(entry)
        if entry in self.new:
            self.new.remove(entry)
        else:
            row = self.rows.index(entry)
            self.rows[row] = None
            self.removed.append(row)


class V2Engine(FakeEngine):
    """Gives requests fixed indices and shows tokens as arrays, as vLLM's second model runner does."""

    def __init__(self, system1, processor, requests, seed: int) -> None:
        super().__init__(system1, processor.batch, requests, seed)
        self.processor, self.state, self.free = processor, processor.requests, list(range(SLOTS))
        self.needs_processing = np.zeros(SLOTS, dtype=bool)

    def join(self, entry: Entry) -> None:
        entry.handle.append(self.free.pop(self.random.randrange(len(self.free))))
        self.state.prefill_len.np[entry.handle[-1]] = len(entry.prompt) + len(entry.written)
        params = SimpleNamespace(extra_args=guidance_args(entry.guidance))
        self.needs_processing[entry.handle[-1]] = self.processor.add_request(entry.handle[-1], params)

    def apply(self, logits: torch.Tensor, partial: set[int]) -> None:
        lengths = []
        for row, entry in enumerate(self.running):
            ids, index = entry.prompt + entry.written, entry.handle[-1]
            self.state.all_token_ids.gpu[index, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            if row in partial:
                self.state.prefill_len.np[index] = len(ids)
            lengths.append(len(ids) - (row in partial))
        indices = np.array([entry.handle[-1] for entry in self.running])
        ctx = SimpleNamespace(idx_mapping_np=indices, seq_lens_upper_bound_np=np.array(lengths))
        if self.needs_processing[indices].any():
            assert self.processor.apply(logits, ctx) is logits

    def leave(self, entry: Entry) -> None:
        self.running.remove(entry)
        self.free.append(entry.handle.pop())


@pytest.fixture(scope="module", params=["full", "prefix"])
def verifier(request, tmp_path_factory) -> ProcessVerifier:
    """Of both kinds with all layers, whose scores are large enough to change choices."""
    folder = tmp_path_factory.mktemp("system1")
    tiny_system1(1).save_pretrained(folder)
    torch.manual_seed(1)
    return ProcessVerifier.from_system1(str(folder), VerifierSpec(kind=request.param), local_files_only=True).eval()


def expect_decoder(engine: FakeEngine, system1, verifier, requests) -> None:
    finished = engine.waiting[:]
    engine.run()
    expected = [written_by_decoder(system1, verifier, *request) for request in requests]
    assert [entry.written for entry in finished] == expected
    assert engine.preemptions > 3
    plain = [written_by_decoder(system1, None, prompt, None) for prompt, _ in requests]
    assert sum(a != b for a, b in zip(plain, expected, strict=True)) > 6, "guidance must change choices"


@pytest.fixture(scope="module")
def requests() -> list[tuple[list[int], GuidanceConfig | None]]:
    return [(prompt, [None, *GUIDANCE][index % 4]) for index, prompt in enumerate(prompts(24))]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("max_tokens, max_branches, varlen", [(8_192, 64, True), (20, 4, True), (20, 4, False)])
def test_random_schedules_write_what_the_decoder_writes(
    system1, verifier, requests, seed, max_tokens, max_branches, varlen, monkeypatch
):
    """In large and small forwards, laid out as on a CPU and as on a GPU."""
    monkeypatch.setattr(core, "MAX_BRANCHES", max_branches)
    monkeypatch.setattr(ModelRunner, "unpadded", varlen)
    batch = batch_of(verifier, max_tokens=max_tokens)
    expect_decoder(FakeEngine(system1, batch, requests, seed), system1, verifier, requests)
    assert len(batch.system2.free_slots) == SLOTS


class FakeV1(ABC):
    @abstractmethod
    def update_state(self, batch_update): ...

    @abstractmethod
    def apply(self, logits): ...


class FakeV2(ABC):
    @abstractmethod
    def add_request(self, req_idx, sampling_params): ...

    @abstractmethod
    def apply(self, logits, ctx): ...


def struct(name: str, *names: str) -> type:
    return make_dataclass(name, names)


@pytest.fixture
def vllm(monkeypatch) -> dict[str, SimpleNamespace]:
    """The parts of vLLM that the processor imports."""
    group = SimpleNamespace(is_last_rank=True)
    state = struct("LogitsProcRequestState", "device", "max_num_reqs", "all_token_ids", "prefill_len")
    modules = {
        "vllm": SimpleNamespace(__version__="9.9", ModelRegistry=SimpleNamespace(register_model=lambda *names: None)),
        "vllm.distributed": SimpleNamespace(
            get_pp_group=lambda: group, get_tensor_model_parallel_rank=lambda: 0, group=group
        ),
        "vllm.logger": SimpleNamespace(init_logger=logging.getLogger),
        "vllm.v1.sample.logits_processor": SimpleNamespace(
            BatchUpdate=struct("BatchUpdate", "removed", "added", "moved"),
            MoveDirectionality=SimpleNamespace(SWAP="swap"),
            LogitsProcessor=FakeV1,
        ),
        "vllm.v1.worker.gpu.sample.logits_processor": SimpleNamespace(
            LogitsContext=struct("LogitsContext", "idx_mapping_np", "seq_lens_upper_bound_np"),
            LogitsProcRequestState=state,
            LogitsProcessor=FakeV2,
        ),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    importing = [f"llm2.vllm.{name}" for name in ("rows", "processor", "transformers_processor", "guard")]
    for name in importing:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield modules
    for name in importing:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def folder(verifier, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("verifier")
    verifier.save_pretrained(path)
    return str(path)


def vllm_config(system1, verifier: str, additional: dict | None = None, **changes) -> SimpleNamespace:
    model = {"model": "m", "hf_text_config": system1.config, "dtype": torch.float32, "max_model_len": 64}
    model |= {"enable_prompt_embeds": False, "is_multimodal_model": False, "logits_processors": ["x"]}
    model |= {"architectures": ["LlamaForCausalLM"], "tokenizer": "m"}
    scheduler = {"async_scheduling": True, "max_num_seqs": SLOTS, "max_num_batched_tokens": 128}
    parallel = {"pipeline_parallel_size": 1, "enable_batch_sharded_sampling": False}
    own = {"speculative_config": None, "use_v2_model_runner": False}
    for values in (model, scheduler, parallel, own):
        values |= {key: changes.pop(key) for key in list(changes) if key in values}
    assert not changes
    return SimpleNamespace(
        additional_config={"llm2_verifier": verifier, **(additional or {})},
        model_config=SimpleNamespace(**model),
        scheduler_config=SimpleNamespace(**scheduler),
        parallel_config=SimpleNamespace(**parallel),
        **own,
    )


def processor_v1(config, processor=None):
    from llm2.vllm import GuidedProcessor

    return (processor or GuidedProcessor)(config, torch.device("cpu"), False)


def processor_v2(config, processor=None):
    from llm2.vllm import GuidedProcessor

    tokens = SimpleNamespace(gpu=torch.zeros(SLOTS, 64, dtype=torch.int32))
    lengths = SimpleNamespace(np=np.zeros(SLOTS, dtype=np.int32))
    fields = {"device": torch.device("cpu"), "max_num_reqs": SLOTS, "all_token_ids": tokens, "prefill_len": lengths}
    return (processor or GuidedProcessor)(config, SimpleNamespace(**fields))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("engine, make", [(V1Engine, processor_v1), (V2Engine, processor_v2)], ids=["V1", "V2"])
def test_both_interfaces_write_what_the_decoder_writes(vllm, system1, verifier, folder, requests, engine, make, seed):
    processor = make(vllm_config(system1, folder))
    expect_decoder(engine(system1, processor, requests, seed), system1, verifier, requests)


class Forbidding(LogitsProcessor):
    """Forbids a third of the tokens, others behind each text."""

    def __init__(self, tokenizer) -> None:
        pass

    def __call__(self, input_ids, scores):
        tokens = torch.arange(scores.shape[1])
        return scores.masked_fill((tokens[None] + input_ids.sum(dim=1, keepdim=True)) % 3 == 0, -torch.inf)


class Both:
    """Two processors, one after the other, as vLLM calls them."""

    def __init__(self, first, second) -> None:
        self.all, self.batch, self.requests = (first, second), second.batch, second.requests
        if self.requests is not None:
            first.requests = self.requests

    def update_state(self, update) -> None:
        for processor in self.all:
            processor.update_state(update)

    def add_request(self, index, params) -> bool:
        return max([processor.add_request(index, params) for processor in self.all])

    def apply(self, logits, *ctx):
        for processor in self.all:
            assert processor.apply(logits, *ctx) is logits
        return logits


@pytest.mark.parametrize("engine, make", [(V1Engine, processor_v1), (V2Engine, processor_v2)], ids=["V1", "V2"])
def test_a_transformers_processor_acts_before_guidance_as_in_the_decoder(
    vllm, system1, verifier, folder, requests, engine, make, monkeypatch
):
    from llm2.vllm import GuidedProcessor, TransformersProcessor

    monkeypatch.setattr("llm2.vllm.transformers_processor.load_tokenizer", lambda name: None)
    names = ["llm2.vllm:TransformersProcessor", "llm2.vllm:GuidedProcessor"]
    config = vllm_config(
        system1, folder, {"llm2_logits_processor": f"{__name__}:Forbidding"}, logits_processors=names, tokenizer="t"
    )
    fake = engine(system1, Both(make(config, TransformersProcessor), make(config, GuidedProcessor)), requests, 0)
    fake.processes = True
    finished = fake.waiting[:]
    fake.run()
    expected, unprocessed = [], []
    for prompt, settings in requests:
        guidance = settings and Guidance(verifier=verifier, **settings.guidance_kwargs())
        process = logits_fn(Forbidding(None), lambda _, prompt=prompt: prompt)
        options = {"max_new_tokens": NEW, "eos": EOS}
        ((completion,),) = Decoder(system1, guidance).decode([prompt], process_logits=process, **options)
        expected.append(completion.token_ids)
        unprocessed.append(written_by_decoder(system1, verifier, prompt, settings))
    assert [entry.written for entry in finished] == expected
    assert sum(a != b for a, b in zip(expected, unprocessed, strict=True)) > 12 and fake.preemptions > 3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"speculative_config": object()}, "speculative_config"),
        ({"enable_prompt_embeds": True}, "prompt_embeds"),
        ({"enable_batch_sharded_sampling": True}, "batch_sharded_sampling"),
        ({"logits_processors": ["llm2.vllm:GuidedProcessor", "llm2.vllm:TransformersProcessor"]}, "expected it behind"),
        ({"architectures": ["LLM2LlamaForCausalLM"]}, "a model that guides before"),
        ({"additional": {"llm2_logits_processor": None}}, "llm2_logits_processor: found None"),
        ({"additional": {"llm2_logits_processor": "nowhere:Class"}}, "'nowhere:Class' cannot be imported"),
    ],
)
def test_a_transformers_processor_that_cannot_act_is_refused(vllm, system1, changes, message, monkeypatch):
    from llm2.vllm import TransformersProcessor
    from llm2.vllm.guard import Guard

    monkeypatch.setattr("llm2.vllm.transformers_processor.load_tokenizer", lambda name: None)
    fine = {"additional": {"llm2_logits_processor": f"{__name__}:Forbidding"}, "tokenizer": "t"}
    fine |= {"logits_processors": ["llm2.vllm:TransformersProcessor"]}

    def config(changes) -> SimpleNamespace:
        made = vllm_config(system1, "verifier", **{**fine, **changes})
        del made.additional_config["llm2_verifier"]
        return made

    processor_v1(config({}), TransformersProcessor)
    Guard(config({}))
    with pytest.raises(UserError, match=message):
        processor_v1(config(changes), TransformersProcessor)
    with pytest.raises(UserError, match=r"nothing that applies it; expected .*TransformersProcessor"):
        Guard(config({"logits_processors": ["x"]}))


@pytest.mark.parametrize("default, silent", [({}, False), ({"llm2_beta": 1.0}, True)], ids=["plain", "guiding"])
def test_v2_says_which_requests_it_guides(vllm, system1, folder, default, silent):
    """`silent`: whether a request without `llm2_beta` is guided."""
    processor = processor_v2(vllm_config(system1, folder, default))
    requests = [{"llm2_beta": 0.5}, {"llm2_beta": "off"}, {"llm2_alpha": 0.3}, {}, None]
    said = [processor.add_request(index, SimpleNamespace(extra_args=each)) for index, each in enumerate(requests)]
    assert said == [True, False, silent, silent, silent]


def test_v2_may_warm_up_first(vllm, system1, verifier, folder, requests):
    """With requests in all slots, still without tokens: 0.33.0 measures the sampler's memory by them."""
    processor = processor_v2(vllm_config(system1, folder))
    for index in range(SLOTS):
        processor.add_request(index, SimpleNamespace(extra_args=guidance_args(GUIDANCE[0])))
    ctx = SimpleNamespace(idx_mapping_np=np.arange(SLOTS), seq_lens_upper_bound_np=np.ones(SLOTS, dtype=np.int32))
    processor.apply(torch.zeros(SLOTS, VOCABULARY), ctx)
    expect_decoder(V2Engine(system1, processor, requests, 0), system1, verifier, requests)


def test_ranks_of_a_pipeline_without_logits_load_nothing(vllm, system1, folder, monkeypatch):
    monkeypatch.setattr(vllm["vllm.distributed"].group, "is_last_rank", False)
    processor = processor_v1(vllm_config(system1, folder))
    assert processor.batch is None
    added = [(0, SimpleNamespace(extra_args={"llm2_beta": 1.0}), [5, 6], [])]
    processor.update_state(SimpleNamespace(removed=[], added=added, moved=[]))
    assert processor.followed == {}


def test_another_interface_is_told_in_one_sentence(vllm, system1, folder, monkeypatch):
    monkeypatch.setattr(FakeV2, "apply", lambda self, logits, ctx, more: None)
    monkeypatch.setattr(
        vllm["vllm.v1.sample.logits_processor"], "BatchUpdate", struct("BatchUpdate", "removed", "added")
    )
    with pytest.raises(UserError, match=r"vLLM 9.9 changed .*, BatchUpdate; .* tested with vLLM 0.31 and 0.32"):
        processor_v1(vllm_config(system1, folder))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"speculative_config": object()}, "speculative_config"),
        ({"enable_prompt_embeds": True}, "prompt_embeds"),
        ({"is_multimodal_model": True}, "multimodal"),
        ({"enable_batch_sharded_sampling": True}, "batch_sharded_sampling"),
        ({"logits_processors": None}, "async_scheduling"),
        ({"hf_text_config": SimpleNamespace(vocab_size=VOCABULARY + 1)}, "found 64 tokens, System 1 has 65"),
        ({"architectures": ["LLM2LlamaForCausalLM"]}, "found no prefix head"),
        ({"additional": {"llm2_bate": 1}}, "unknown key 'llm2_bate'"),
        ({"additional": {"llm2_beta": 1.0, "llm2_alpha": 3.0}}, "llm2_alpha: found 3.0"),
    ],
)
def test_an_engine_that_cannot_guide_is_refused(system1, folder, changes, message):
    check_engine(vllm_config(system1, folder))
    with pytest.raises(UserError, match=message):
        check_engine(vllm_config(system1, folder, **changes))


def test_a_window_shorter_than_the_sequences_is_refused(system1, verifier, tmp_path):
    verifier.config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["backbone_config"] |= {"model_type": "mistral", "sliding_window": 32}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="max_model_len: found 64, expected at most 32"):
        check_engine(vllm_config(system1, str(tmp_path)))


REQUEST = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


@pytest.mark.parametrize(
    "extra_args, changes, message",
    [
        ({"llm2_beta": -1.0}, {}, "llm2_beta: found -1.0"),
        ({"llm2_beta": math.inf}, {}, "llm2_beta: found inf"),
        ({"llm2_beta": "0.5"}, {}, "llm2_beta: found '0.5'"),
        ({"llm2_beta": 0.5, "llm2_alpha": 0.0}, {}, "alpha above 0"),
        ({"llm2_alpha": 1.5}, {}, "llm2_alpha: found 1.5"),
        ({"llm2_beta": 0.5, "llm2_topk": 3}, {}, "unknown key 'llm2_topk'"),
        ({"llm2_beta": 0.5}, {"presence_penalty": 0.1}, "presence_penalty: found 0.1"),
    ],
)
def test_a_wrong_request_is_refused_before_it_runs(vllm, extra_args, changes, message):
    from llm2.vllm import GuidedProcessor

    for fine in (None, {}, {"other": 1}, {"llm2_beta": 0.5}, {"llm2_beta": "off"}):
        GuidedProcessor.validate_params(SimpleNamespace(extra_args=fine, **REQUEST))
    with pytest.raises(ValueError, match=message):
        GuidedProcessor.validate_params(SimpleNamespace(extra_args=extra_args, **REQUEST | changes))


def test_a_request_is_guided_where_it_or_the_engine_says_so():
    plain = engine_settings({"llm2_verifier": "v", "llm2_alpha": 0.2, "foreign": 1})
    assert request_guidance({}, plain) is None and request_guidance({"llm2_alpha": 0.3}, plain) is None
    assert request_guidance({"llm2_beta": 2.0}, plain) == GuidanceConfig(alpha=0.2, beta=2.0)
    default = engine_settings({"llm2_verifier": "v", "llm2_beta": 0.5, "llm2_top_k": 4})
    assert request_guidance(None, default) == GuidanceConfig(beta=0.5, top_k=4)
    assert request_guidance({"llm2_alpha": 0.3}, default) == GuidanceConfig(alpha=0.3, beta=0.5, top_k=4)
    assert request_guidance({"llm2_beta": "off"}, default) is None


@pytest.mark.parametrize(
    "changes, guides",
    [
        ({}, True),
        ({"logits_processors": None}, False),
        ({"logits_processors": ["other:Processor"]}, False),
        ({"logits_processors": ["llm2.vllm:GuidedProcessor"]}, True),
        ({"logits_processors": None, "architectures": ["LLM2LlamaForCausalLM"]}, False),
        ({"logits_processors": None, "architectures": ["LLM2LlamaForCausalLM"], "additional": {"llm2_beta": 1}}, True),
        ({"logits_processors": None, "foreign": True}, True),
    ],
)
def test_an_engine_with_a_verifier_that_nothing_asks_does_not_start(vllm, system1, changes, guides):
    from llm2.vllm.guard import Guard

    changes = {"logits_processors": ["llm2.vllm:GuidedProcessor"], **changes}
    foreign = changes.pop("foreign", False)
    config = vllm_config(system1, "verifier", **changes)
    if foreign:
        config.additional_config = {"other": 1}
    if not guides:
        with pytest.raises(UserError, match="llm2_verifier.* nothing that guides.*--logits-processors llm2.vllm:"):
            Guard(config, None, False)
        return
    guard, logits = Guard(config, SimpleNamespace()), torch.randn(2, 3)
    assert guard.is_argmax_invariant() and guard.apply(logits) is logits and not guard.add_request(0, None)


def test_vllm_finds_the_guard_by_its_entry_point():
    with open("pyproject.toml", "rb") as file:
        (target,) = tomllib.load(file)["project"]["entry-points"]["vllm.logits_processors"].values()
    assert target == "llm2.vllm.guard:Guard"


def test_a_server_tells_what_it_has_guided(system1, verifier, requests, monkeypatch):
    """At least a row of logits for each token written, by beta, and the forwards of the rank that guides."""
    monkeypatch.setattr(core, "total", Counter())
    batch, read = batch_of(verifier), []
    forward = batch.system2.runner.forward
    monkeypatch.setattr(
        batch.system2.runner, "forward", lambda cache, chunks: read.append(chunks) or forward(cache, chunks)
    )
    engine = FakeEngine(system1, batch, requests, 0)
    entries = engine.waiting[:]
    assert proof.CountingWorker().llm2_counts()["guided_tokens"] == {}
    engine.run()
    ranks = [{"guided_tokens": {}}, proof.CountingWorker().llm2_counts()]

    async def collective_rpc(method):
        return [getattr(proof.CountingWorker, method) and rank for rank in ranks]

    async def app(scope, receive, send):
        await send("another route")

    async def send(message):
        sent.append(message)

    parallel = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))
    state = SimpleNamespace(engine_client=SimpleNamespace(collective_rpc=collective_rpc), vllm_config=parallel)
    scope, sent = {"path": "/v1/llm2", "app": SimpleNamespace(state=state)}, []
    asyncio.run(proof.Endpoint(app)(scope, None, send))
    told = json.loads(sent[1]["body"])
    assert told.keys() == {"started", "guided_tokens", "verifier_forwards", "verifier_tokens", "engines"}
    assert told["verifier_tokens"] == sum(len(chunk.ids) for chunks in read for chunk in chunks)
    assert told["verifier_forwards"] == len(read) > 0
    for guidance in GUIDANCE:
        written = sum(len(entry.written) for entry in entries if entry.guidance == guidance)
        assert told["guided_tokens"][f"{guidance.beta:g}"] >= written > 0
    asyncio.run(proof.Endpoint(app)(scope | {"path": "/v1/models"}, None, send))
    assert sent[2:] == ["another route"]


def test_the_memory_of_system_2_is_what_it_takes(system1, verifier):
    text = describe_memory(verifier.config, torch.float32, SLOTS, 2_000_000)
    cache = 2 * 2 * 2 * 8 * 4 * SLOTS * (2_000_000 + core.MAX_BRANCHES + 1)  # keys, values; layers; heads; width; bytes
    assert f"{cache / 2**20:,.0f} MiB of cache for max_num_seqs=5 sequences of max_model_len=2000000" in text


def test_a_shared_prefix_is_read_once(system1, verifier, monkeypatch):
    monkeypatch.setattr(core, "total", together := Counter())
    prompt, guidance = prompts(3)[0][:0] + list(range(3, 43)), GUIDANCE[0]
    batch = batch_of(verifier, 4)
    logits = torch.zeros(4, VOCABULARY)
    rows = [(row, batch.join(guidance, [*prompt, 50 + row])) for row in range(4)]
    batch.guide(logits, rows)
    branches = VOCABULARY if verifier.config.reads_candidates else 0  # flat logits: every token is a candidate
    assert together["system2_tokens"] == 40 + 4 * (1 + branches)
    monkeypatch.setattr(core, "total", one_by_one := Counter())
    alone = batch_of(verifier, 1)
    for row in range(4):
        expected = torch.zeros(1, VOCABULARY)
        sequence = alone.join(guidance, [*prompt, 50 + row])
        alone.guide(expected, [(0, sequence)])
        alone.leave(sequence)
        assert logits[row].tolist() == pytest.approx(expected[0].tolist(), abs=1e-4)
    assert one_by_one["system2_tokens"] == 41 + 3 + 4 * branches  # a slot that is free still holds the prefix


def test_a_score_that_is_not_finite_leaves_the_token_to_system_1_and_is_logged_once(system1, verifier, caplog):
    guidance = GuidanceConfig(alpha=0.001, beta=2.0)
    batch = batch_of(verifier, 2, 40)
    sequences = [batch.join(guidance, prompt) for prompt in ([5, 6, 7], [8, 9])]
    logits = torch.randn(2, system1.config.vocab_size)
    candidates, valid = plausible(logits, 0.001)
    expected = logits[0, candidates[0]][valid[0]].sort().values
    score = batch.system2.score

    def spoilt(*arguments):
        scores = score(*arguments)
        scores[0, 1] = torch.nan
        return scores

    batch.system2.score = spoilt
    for _ in range(2):
        guided = logits.clone()
        batch.guide(guided, list(enumerate(sequences)))
        assert torch.equal(guided[0][guided[0].isfinite()].sort().values, expected)
        assert not torch.equal(guided[1], logits[1]) and not guided.isnan().any()
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "a score of System 2 is not finite at token 3 of a request"
    ]


def test_nothing_is_allocated_after_the_start(system1, verifier):
    batch = batch_of(verifier, 2, 30)
    buffers = [buffer.data_ptr() for layer in batch.system2.cache.layers.values() for buffer in layer]
    assert len(buffers) == 4
    sequence = batch.join(GUIDANCE[0], range(3, 33))
    batch.guide(torch.zeros(1, VOCABULARY), [(0, sequence)])
    assert [buffer.data_ptr() for layer in batch.system2.cache.layers.values() for buffer in layer] == buffers


def test_a_recomputed_trace_is_the_decoders(system1, verifier):
    guidance = Guidance(verifier=verifier, alpha=0.02, beta=3.0)
    batch = prompts(6)
    rows = Decoder(system1, guidance).decode(batch, max_new_tokens=NEW, eos=EOS, trace=True)
    changed = 0
    for prompt, (completion,) in zip(batch, rows, strict=True):
        again = recompute_trace(system1, guidance, prompt, completion._replace(trace=None), sampled=False)
        for token, expected in zip(again.trace, completion.trace, strict=True):
            assert (token.candidates, token.chosen, token.changed) == (
                expected.candidates,
                expected.chosen,
                expected.changed,
            )
            assert token.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
            assert (token.scores is None) == (expected.scores is None)
            if token.scores is not None:  # only their differences have a meaning
                assert differences(token.scores) == pytest.approx(differences(expected.scores), abs=1e-3)
            changed += token.changed
    assert changed > 3


def differences(scores: list[float]) -> list[float]:
    return [score - scores[0] for score in scores]


def test_verifier_calls_are_counted_from_log_probabilities(system1_folder, verifier, monkeypatch):
    config = EvaluateConfig(
        model=system1_folder, task="testbed", output_dir="o", alpha=0.1, verifier="v", device="cpu", engine="vllm"
    )
    sent = []

    class Backend:
        def stream(self, prompts, options):
            sent.extend(options)
            likeliest = [[-0.1, -2.0], [-0.1, -3.0], [-2.0, -0.2, -9.0]]  # ln 10 = 2.3: the second has no choice
            yield 0, Answer([[5, 6, 7]], [likeliest], [])

    monkeypatch.setattr("llm2.evaluation.vllm_decoder.open_backend", lambda *arguments: Backend())
    guidance = Guidance(verifier=verifier, alpha=0.1, beta=0.5)
    decoder = VllmDecoder(config, guidance, load_tokenizer(system1_folder))
    ((index, (completion,)),) = decoder.decode(Mode.GUIDED_GREEDY, [[3, 4]], [[-1]])
    assert (index, completion.token_ids, completion.num_verifier_calls) == (0, [5, 6, 7], 2)
    branches = 2 + 2 if verifier.config.reads_candidates else 0
    assert completion.num_verifier_tokens == 2 + 2 + branches  # prompt, the two tokens before the last choice
    assert sent[0]["extra_args"] == {"llm2_alpha": 0.1, "llm2_beta": 0.5} and sent[0]["seed"] == 2**31 - 1
    next(decoder.decode(Mode.PLAIN_SAMPLING, [[3, 4]], [[1, 2]]))
    assert "extra_args" not in sent[1] and (sent[1]["n"], sent[1]["temperature"]) == (2, 1.0)


@pytest.mark.parametrize("kind", [EvaluateConfig, ExploreConfig, ServeConfig, ServedBenchmark, RolloutBenchmark])
def test_each_config_that_starts_vllm_has_the_keys_of_its_engine(kind):
    needed = {"model": "testbed", "task": "testbed", "output_dir": "o", "output": "o", "verifier": "v"}
    needed |= {"benchmark": {ServedBenchmark: "served", RolloutBenchmark: "rollouts"}.get(kind)}
    known = {key: value for key, value in needed.items() if key in kind.__dataclass_fields__}
    options = engine_options(kind(**known, device="cpu", dtype="float32"), None)
    assert options["dtype"] == "float32" and Path(options["model"]).is_dir()


def test_serving_checks_the_template_and_prints_a_request(system1_folder, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "verifier")
    config = ServeConfig(model=system1_folder, verifier=str(tmp_path / "verifier"), device="cpu", port=8123)
    train = TrainConfig(model=system1_folder, train_file="t", output_dir="o", chat_template="llama3-plain")
    write_config(train, tmp_path / "verifier" / "train.yaml")
    serve.check(config)  # the model's own template is that one
    with pytest.raises(UserError, match="chat_template: found 'chatml-plain', expected 'llama3-plain'"):
        serve.check(replace(config, chat_template="chatml-plain"))
    with pytest.raises(UserError, match="float16_weights: found true, expected false"):
        serve.check(replace(config, float16_weights=True))
    content = shlex.split(serve.curl(config, GuidanceConfig(beta=0.5)))[-1]
    assert json.loads(content)["vllm_xargs"] == {"llm2_beta": 0.5, "llm2_alpha": 0.1}
    options = serve.command_line({"enforce_eager": True, "enable_chunked_prefill": False, "a": ["b"], "c": {"d": 1}})
    assert options == ["--enforce-eager", "--no-enable-chunked-prefill", "--a", "b", "--c", '{"d": 1}']


@pytest.mark.parametrize("by_default", [False, True])
def test_a_server_gets_alpha_and_top_k_of_requests_that_do_not_set_them(
    system1_folder, folder, monkeypatch, by_default
):
    for name in ("require_vllm", "check_options"):
        monkeypatch.setattr(serve, name, lambda *_: None)
    monkeypatch.setattr(serve.runpy, "run_module", lambda *_, **__: None)
    monkeypatch.setattr(serve.sys, "argv", [])
    settings = {"alpha": 0.3, "top_k": 2, "beta": 0.5, "guide_by_default": by_default}
    config = ServeConfig(model=system1_folder, verifier=str(folder), device="cpu", **settings)
    serve.serve(config)
    arguments = dict(itertools.pairwise(serve.sys.argv))
    engine = engine_settings(json.loads(arguments["--additional-config"]))
    found = request_guidance({"llm2_beta": 0.25}, engine)
    assert (found.alpha, found.top_k, found.beta) == (0.3, 2, 0.25)
    assert (request_guidance({}, engine) is not None) == by_default
    assert json.loads(arguments["--override-generation-config"])["repetition_penalty"] == 1.0
    content = json.loads(shlex.split(serve.curl(config, GuidanceConfig(beta=0.5, top_k=2)))[-1])
    assert content["vllm_xargs"] == {"llm2_beta": 0.5, "llm2_alpha": 0.1, "llm2_top_k": 2}


def test_a_checkpoint_has_the_fingerprint_of_its_model(system1, tmp_path):
    system1.save_pretrained(tmp_path)
    config = SimpleNamespace(system1_fingerprint=fingerprint(system1.base_model), base_model="m")
    check_fingerprint(str(tmp_path), "head", config)
    with pytest.raises(UserError, match="found another System 1"):
        check_fingerprint(str(tmp_path), "head", SimpleNamespace(system1_fingerprint="other", base_model="m"))


def test_the_built_in_head_is_loaded_by_its_name():
    assert load_head("testbed-verifier", verifier_config("testbed-verifier")).state_dict()


def test_a_prefix_heads_batch_writes_what_the_decoder_writes(system1, requests, tmp_path):
    """With System 1's states as the model plug-in shows them."""
    system1.save_pretrained(tmp_path)
    torch.manual_seed(3)
    spec = VerifierSpec(kind="bilinear", prefix_head_size=4, token_weight=True)
    verifier = ProcessVerifier.from_system1(str(tmp_path), spec, local_files_only=True).eval()
    with torch.no_grad():
        for weight in verifier.score.parameters():
            weight.mul_(2.0)
    verifier.save_pretrained(tmp_path / "head")
    batch = HeadBatch()
    batch.head, batch.embed = load_head(str(tmp_path / "head"), verifier.config), system1.get_input_embeddings()

    texts = [list(prompt) for prompt, _ in requests]
    rows = [(row, batch.join(guidance, ())) for row, (_, guidance) in enumerate(requests) if guidance]
    for _ in range(NEW):
        with torch.inference_mode():
            batch.shown = torch.stack([system1.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in texts])
            logits = system1.lm_head(batch.shown)
        batch.guide(logits, rows)
        for ids, token in zip(texts, logits.argmax(dim=-1).tolist(), strict=True):
            ids.append(token)
    changed = 0
    for ids, (prompt, guidance) in zip(texts, requests, strict=True):
        expected = written_by_decoder(system1, verifier, prompt, guidance)
        assert ids[len(prompt) :][: len(expected)] == expected
        changed += expected != written_by_decoder(system1, None, prompt, None)
    assert changed > 3
