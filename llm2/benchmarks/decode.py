"""Guided decoding against transformers' `generate`: what does System 2 cost?

Both systems are Llamas with random weights. A random System 1 is unsure of every token, so its logits are scaled until
the asked share of its steps has more than one candidate, as a trained one's have.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from llm2.benchmarks.configs import DecodeBenchmark
from llm2.benchmarks.runner import (
    BenchmarkCase,
    markdown_table,
    peak_memory,
    rows,
    run_interleaved,
    spread,
    write_results,
)
from llm2.benchmarks.shapes import llama_shape
from llm2.common.loading import resolve_device, resolve_dtype
from llm2.decoding.decoder import Decoder
from llm2.decoding.sampling import Guidance
from llm2.verifier import lora
from llm2.verifier.model import ProcessVerifier

GENERATE = "transformers generate, System 1 alone"
SEPARATE = "LLM2, separate verifier"
COMPILED = "transformers generate, static cache, compiled"
FACTS = ("verifier_forwards", "candidates", "choice_share", "bandwidth_share")


def measure(config: DecodeBenchmark) -> str:
    """Time every case at every batch size, write `config.output`, return the table."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    torch.manual_seed(config.seed)
    system1, separate, shared = build(config, device, torch.bfloat16 if dtype == "auto" else dtype)
    found = []
    for batch_size in config.batch_sizes:
        prompts = torch.randint(config.vocab_size, (batch_size, config.prompt_tokens)).tolist()
        scale_logits(system1, prompts, config)
        cases = contestants_of(config, system1, separate, shared, prompts)
        run_interleaved(cases, config.rounds, f"batch {batch_size}")
        for case in cases:
            case.peak_mib = peak_memory(case.run, device)
        if device.type == "cuda" and batch_size == 1:  # a small model on a CPU is read from its caches
            tell_bandwidth(cases, system1, separate, bandwidth(device))
        found += rows(cases)
    adapter = sum(tensor.numel() for name, tensor in shared.state_dict().items() if "lora_" in name or "score" in name)
    weights = adapter / sum(parameter.numel() for parameter in system1.parameters())
    write_results(Path(config.output), config.rounds, found, config=vars(config), shared_verifier_weights=weights)
    table = markdown_table(found, FACTS)
    return f"{table}\n\nThe shared verifier adds {weights:.2%} of System 1's weights."


def build(
    config: DecodeBenchmark, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, ProcessVerifier, ProcessVerifier]:
    """System 1, a verifier with weights of its own, and a LoRA verifier on System 1's."""
    shape = llama_shape(config, config.prompt_tokens + config.new_tokens)
    with device:
        system1 = LlamaForCausalLM(shape).to(dtype).eval()
        separate = ProcessVerifier.from_backbone(LlamaForCausalLM(shape).to(dtype).model, "", None).eval()
        shared = ProcessVerifier.from_backbone(
            lora.clone_sharing_weights(system1.model), "", {"rank": config.lora_r}
        ).eval()
    for verifier in (separate, shared):
        for name, parameter in verifier.named_parameters():
            if "lora_B" in name or name == "score.weight":  # else an adapter begins as nothing, and a head undrawn
                torch.nn.init.normal_(parameter, std=0.02)
    return system1, separate, shared


def scale_logits(system1: PreTrainedModel, prompts: list[list[int]], config: DecodeBenchmark) -> None:
    """Scale the head until `choice_share` of the steps along System 1's own greedy text has another candidate.

    Scaling moves no argmax, so the text is the same before and after: the scale follows from the gaps along it.
    """
    written = Decoder(system1).decode(prompts, max_new_tokens=config.new_tokens, eos=[], trace=True, keep_logits=True)
    best = torch.stack([choice.logits.topk(2).values for (row,) in written for choice in row.trace])
    gap = (best[:, 0] - best[:, 1]).quantile(config.choice_share).item()
    system1.lm_head.weight.data *= -math.log(config.alpha) / gap


def contestants_of(
    config: DecodeBenchmark,
    system1: PreTrainedModel,
    separate: ProcessVerifier,
    shared: ProcessVerifier,
    prompts: list[list[int]],
) -> list[BenchmarkCase]:
    """All rows of one batch size."""
    options = {"alpha": config.alpha, "beta": config.beta}
    decoders = {
        "LLM2, no verifier": Decoder(system1),
        "LLM2, separate verifier at every token": Decoder(system1, Guidance(verifier=separate, **options, lazy=False)),
        SEPARATE: Decoder(system1, Guidance(verifier=separate, **options)),
        "LLM2, shared LoRA verifier": Decoder(system1, Guidance(verifier=shared, **options)),
    }
    on_gpu = system1.device.type == "cuda"
    if on_gpu:
        decoders["LLM2, shared LoRA verifier, no CUDA graphs"] = Decoder(
            system1, Guidance(verifier=shared, **options), graphs=False
        )
    base = COMPILED if on_gpu else GENERATE
    runs: dict[str, Callable[[], float]] = {GENERATE: lambda: generate(system1, prompts, config)}
    if on_gpu:
        runs[COMPILED] = lambda: generate(system1, prompts, config, cache_implementation="static")
    for name, decoder in decoders.items():
        runs[name] = lambda decoder=decoder: decode(decoder, prompts, config)
    if len(prompts) == 1:
        guidance = Guidance(verifier=separate, **options)
        runs["the method as published, no cache"] = lambda: naive(system1, guidance, prompts[0], config.new_tokens)
    return [
        BenchmarkCase(
            name=name,
            run=run,
            unit="tokens/s",
            batch_size=len(prompts),
            ratio_to=None if name == base else base,
            extra=extra(decoders[name], prompts, config) if name in decoders else {},
        )
        for name, run in runs.items()
    ]


def generate(system1: PreTrainedModel, prompts: list[list[int]], config: DecodeBenchmark, **options) -> float:
    ids = torch.tensor(prompts, device=system1.device)
    written = system1.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=config.new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return written[:, ids.shape[1] :].numel()


def decode(decoder: Decoder, prompts: list[list[int]], config: DecodeBenchmark) -> float:
    written = decoder.decode(prompts, max_new_tokens=config.new_tokens, eos=[], batch_size=len(prompts))
    return sum(len(row.token_ids) for (row,) in written)


def extra(decoder: Decoder, prompts: list[list[int]], config: DecodeBenchmark) -> dict[str, float]:
    """What happens on the way, per token."""
    if decoder.guidance is None:
        return {}
    decoder.counts.clear()
    written = decoder.decode(prompts, max_new_tokens=config.new_tokens, eos=[], batch_size=len(prompts), trace=True)
    sizes = [len(choice.candidates) for (row,) in written for choice in row.trace]
    return {
        "verifier_forwards": decoder.counts["system2_forwards"] / (len(sizes) / len(prompts)),
        "candidates": sum(sizes) / len(sizes),
        "choice_share": sum(size > 1 for size in sizes) / len(sizes),
    }


def tell_bandwidth(
    cases: list[BenchmarkCase], system1: PreTrainedModel, separate: ProcessVerifier, speed: float
) -> None:
    """Of batch 1: which share of the bytes that memory could deliver were weights, each read once a token.

    A separate verifier's are read as often as it is asked. Of embeddings one row is read: they do not count.
    """
    own = weight_bytes(system1)
    for case in cases:
        asked = case.extra.get("verifier_forwards", 0.0) if "separate" in case.name else 0.0
        read = own + asked * weight_bytes(separate.backbone)
        case.extra["bandwidth_share"] = spread(case.rates)["median"] * read / speed


def weight_bytes(model: PreTrainedModel) -> int:
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    looked_up = head is None or head.weight is not embedding
    return sum(parameter.nbytes for parameter in model.parameters()) - looked_up * embedding.nbytes


def bandwidth(device: torch.device, size: int = 2**30, copies: int = 10) -> float:
    """Bytes a second that memory delivers and takes: the quickest of some copies of so many bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target, quickest = torch.empty_like(source), math.inf
    for _ in range(copies):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        quickest = min(quickest, time.perf_counter() - start)
    return 2 * size / quickest


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def naive(system1: PreTrainedModel, guidance: Guidance, prompt: list[int], new_tokens: int) -> float:
    """One sequence, no cache: all of it read anew for the next logits, and for each candidate's score."""
    ids = torch.tensor([prompt], device=system1.device)
    for _ in range(new_tokens):
        logits = system1(ids, logits_to_keep=1).logits[0, -1]
        candidates = (logits >= logits.max() + math.log(guidance.alpha)).nonzero()  # (K, 1)
        guided = logits[candidates[:, 0]]
        if len(candidates) > 1:
            whole = torch.cat([ids.expand(len(candidates), -1), candidates], dim=-1)
            guided = guided + guidance.beta * guidance.verifier(whole).scores[:, -1]
        ids = torch.cat([ids, candidates[guided.argmax()][None]], dim=-1)
    return new_tokens
