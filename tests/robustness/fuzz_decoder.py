"""The decoder's scheduler against its slow twin: random prompts, limits, stops, seeds, arrivals, layouts, verifiers."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from hypothesis import strategies as st

from llm2.decoding import scheduler
from llm2.decoding.decoder import Decoder
from llm2.decoding.model_runner import ModelRunner
from llm2.decoding.sampling import Completion, Guidance, SamplingParams
from tests.conftest import VOCABULARY
from tests.reference import decode_one
from tests.robustness.property import Property
from tests.test_decoder import of_family
from tests.test_prefix_score import prefix_verifier

KINDS = ("full", "lora", "lora apart", "layers", "bilinear")  # of the verifier; None for System 1 alone
NOISE = 3e-5  # more than float32's rounding moves a logit or a score here
NOISY_TWINS = 24


@dataclass(frozen=True)
class Call:
    """One request of a decoder."""

    prompts: tuple[tuple[int, ...], ...]
    seeds: tuple[tuple[int, ...], ...]  # of each prompt
    max_new_tokens: int
    eos: frozenset[int]
    temperature: float | None
    batch_size: int
    stop_at: int | None  # a sequence ends once the sum of its new tokens is a multiple

    def stop(self, prompt: int, sample: int, new: Sequence[int]) -> bool:
        return self.stop_at is not None and sum(new) % self.stop_at == 0


@dataclass(frozen=True)
class Scene:
    """A decoder, and calls whose streams are read in turns: while one is under way, others arrive."""

    kind: str | None
    alpha: float
    beta: float
    top_k: int | None
    lazy: bool
    verify_fraction: float
    layout: str
    min_in_place_tokens: int
    trace: bool
    calls: tuple[Call, ...]
    turns: tuple[int, ...]


@st.composite
def calls(draw: st.DrawFn) -> Call:
    stem = draw(st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=30))  # what prompts may share
    prompts, seeds = [], []
    for _ in range(draw(st.integers(0, 4))):
        own = draw(st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=4))
        prompts.append((*stem[: draw(st.integers(0, len(stem)))], *own))
        seeds.append(tuple(draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3))))
    return Call(
        prompts=tuple(prompts),
        seeds=tuple(seeds),
        max_new_tokens=draw(st.integers(1, 7)),
        eos=draw(st.frozensets(st.integers(0, VOCABULARY - 1), max_size=6)),
        temperature=draw(st.none() | st.sampled_from([0.3, 1.0, 2.0])),
        batch_size=draw(st.integers(1, 9)),
        stop_at=draw(st.none() | st.integers(2, 9)),
    )


SCENES = st.builds(
    Scene,
    kind=st.none() | st.sampled_from(KINDS),
    alpha=st.sampled_from([0.0005, 0.02, 0.1, 0.5, 1.0]),
    beta=st.sampled_from([0.0, 0.25, 3.0, 30.0]),
    top_k=st.none() | st.integers(1, 9),
    lazy=st.booleans(),
    verify_fraction=st.sampled_from([0.0, 0.5, 1.0]),
    layout=st.sampled_from(["varlen", "padded", "graphs"]),
    min_in_place_tokens=st.sampled_from([0, 10**9]),
    trace=st.booleans(),
    calls=st.lists(calls(), min_size=1, max_size=3).map(tuple),
    turns=st.lists(st.integers(0, 2), max_size=12).map(tuple),
)


@cache
def systems(kind: str | None) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    with tempfile.TemporaryDirectory() as folder:
        if kind is None or kind in ("full", "lora", "lora apart"):
            model, verifier = of_family("llama", folder, **({"lora": {"rank": 4}} if kind and "lora" in kind else {}))
            return model, verifier if kind else None
        model, _ = of_family("llama", folder)
        return model, prefix_verifier(Path(folder, "verifier"), model, kind)


def check_scene(scene: Scene, folder: Path) -> None:
    torch.set_num_threads(1)
    model, verifier = systems(scene.kind)
    settings = {"alpha": scene.alpha, "beta": scene.beta, "top_k": scene.top_k} if verifier is not None else {}
    guidance = verifier and Guidance(
        verifier=verifier,
        lazy=scene.lazy,
        verify_fraction=scene.verify_fraction,
        shared=scene.kind != "lora apart",
        **settings,
    )
    with ExitStack() as stack:
        stack.enter_context(patch.object(scheduler, "MIN_IN_PLACE_TOKENS", scene.min_in_place_tokens))
        if scene.layout == "padded":
            stack.enter_context(patch.object(ModelRunner, "unpadded", False))
        decoder = Decoder(model, guidance, graphs=scene.layout == "graphs")
        written = [dict.fromkeys(range(len(call.prompts))) for call in scene.calls]
        streams = [stream(decoder, call, scene.trace, written[number]) for number, call in enumerate(scene.calls)]
        for turn in scene.turns:
            next(streams[turn % len(streams)], None)
        for each in streams:
            assert list(each) is not None
    for call, completions in zip(scene.calls, written, strict=True):
        for prompt, samples in completions.items():
            assert samples is not None and len(samples) == len(call.seeds[prompt]), "completions are missing"
            for sample, completion in enumerate(samples):
                check_completion(model, verifier, settings, call, prompt, sample, completion)


def stream(decoder: Decoder, call: Call, trace: bool, written: dict[int, list[Completion]]) -> Iterator[None]:
    """Decode, and file each prompt's completions as they come."""
    seen: dict[tuple[int, int], list[int]] = {}
    for index, completions in decoder.stream(
        call.prompts,
        max_new_tokens=call.max_new_tokens,
        eos=call.eos,
        sampling=None if call.temperature is None else SamplingParams(temperature=call.temperature),
        seeds=call.seeds,
        batch_size=call.batch_size,
        stop=call.stop,
        on_token=lambda prompt, sample, token: seen.setdefault((prompt, sample), []).append(token),
        trace=trace,
    ):
        assert written[index] is None, "completions came twice"
        for sample, completion in enumerate(completions):
            assert completion.token_ids == seen[index, sample]
            if trace:
                assert [each.candidates[each.chosen] for each in completion.trace] == completion.token_ids
        written[index] = completions
        yield


def check_completion(model, verifier, settings: dict, call: Call, prompt: int, sample: int, completion) -> None:
    def twin(model, verifier) -> list[int]:
        options = settings | ({"verifier": verifier} if settings else {})
        if call.temperature is not None:
            options |= {"seed": call.seeds[prompt][sample], "temperature": call.temperature}
        ids = decode_one(model, call.prompts[prompt], max_new_tokens=call.max_new_tokens, eos=call.eos, **options)
        ends = (end for end in range(1, len(ids)) if call.stop(prompt, sample, ids[:end]))
        return ids[: next(ends, len(ids))]

    expected = twin(model, verifier)
    if completion.token_ids != expected:  # allowed only where rounding decides, and then it is one of the twins
        twins = [twin(noisy(model, number), verifier and noisy(verifier, -number)) for number in range(1, NOISY_TWINS)]
        assert completion.token_ids in twins, f"{completion.token_ids}, expected {expected}"
    assert completion.num_verifier_calls <= len(completion.token_ids)


def noisy(model, number: int):
    """The model with logits or scores that differ by as much as rounding may."""
    generator = torch.Generator().manual_seed(1_000 + number)

    def call(ids: torch.Tensor) -> SimpleNamespace:
        output = model(ids)
        name = "logits" if "logits" in output else "scores"
        return SimpleNamespace(**{name: output[name] + NOISE * torch.randn(output[name].shape, generator=generator)})

    return call


PROPERTY = Property("requests to the decoder, against its slow twin", SCENES, check_scene, 3_000)
