"""Guided decoding against transformers' `generate`: what does System 2 cost?

Both systems are Llamas with random weights, or have those of a given model. A System 1 is unsure of most tokens behind
random prompts, so its logits are scaled until a given share of the steps has more than one candidate.
"""

import copy
import math
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.configs import DecodeBenchmark
from benchmarks.runner import BenchmarkCase, peak_memory, report, run_interleaved, spread
from llm2.common.loading import load_system1, resolve_device, resolve_dtype
from llm2.config import VerifierSpec
from llm2.decoding.candidates import guided_logits, plausible
from llm2.decoding.decoder import Decoder
from llm2.decoding.sampling import Guidance
from llm2.verifier import lora
from llm2.verifier.model import ProcessVerifier

GENERATE = "transformers generate, System 1 alone"
COMPILED = "transformers generate, static cache, compiled"
SEPARATE, SHARED = "LLM2, separate verifier", "LLM2, shared LoRA verifier"
COLUMNS = ["verifier_forwards", "candidates", "choice_share", "bandwidth_share"]
LAYOUT = (
    "In the layout for CUDA graphs, 32 prompts of mixed lengths, 16 at a time: calls of a step that wait for the "
    "device (host_reads), the same with traces, tokens computed for each one that is read (padding), share of the "
    "forwards that are replayed."
)
WAITING = ("tolist", "item", "cpu", "nonzero", "bincount", "__int__", "__float__", "__bool__")
CALIBRATED = 32  # prompts that the scale of System 1's logits is found with: all logits of each are kept


def measure(config: DecodeBenchmark) -> str:
    """Measure every case at every batch size, write `config.output`, return the table."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    torch.manual_seed(config.seed)
    system1, separate, shared = build(config, device, torch.bfloat16 if dtype == "auto" else dtype)
    measured = []
    for batch_size in config.batch_sizes:
        prompts = torch.randint(system1.config.vocab_size, (batch_size, config.prompt_tokens)).tolist()
        scale_logits(system1, prompts, config)
        cases = benchmark_cases(config, system1, separate, shared, prompts)
        run_interleaved(cases, config, f"batch {batch_size}", measured, COLUMNS)
        for case in cases:
            case.peak_mib = peak_memory(case.run, device)
        if device.type == "cuda" and batch_size == 1:  # a CPU's caches hold a small model
            add_bandwidth_share(cases, system1, separate, memory_bandwidth(device))
        measured += cases
    adapter = sum(tensor.numel() for name, tensor in shared.state_dict().items() if "lora_" in name or "score" in name)
    share = adapter / sum(parameter.numel() for parameter in system1.parameters())
    counts = {}
    for name, verifier in ((SEPARATE, separate), (SHARED, shared)) if config.graphs else ():
        guidance = Guidance(verifier=verifier, **config.guidance_kwargs())
        counts[name] = layout_counts(Decoder(system1, guidance, graphs=True), config)
    table = report(config, measured, COLUMNS, shared_verifier_weights=share, layout=counts)
    lines = [f"The shared verifier adds {share:.2%} to System 1's weights.", *[LAYOUT] * bool(counts)]
    lines += [f"{name}: {', '.join(f'{key} {value:.3g}' for key, value in of.items())}" for name, of in counts.items()]
    return "\n\n".join([table, *lines])


def build(
    config: DecodeBenchmark, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, ProcessVerifier, ProcessVerifier]:
    """System 1, a verifier with separate weights, and a LoRA verifier that shares System 1's."""
    shape = LlamaConfig(**config.shape(), max_position_embeddings=config.prompt_tokens + config.new_tokens)
    with device:
        if config.model is None:
            system1, backbone = (LlamaForCausalLM(shape).to(dtype).eval() for _ in range(2))
        else:
            system1 = load_system1(config.model, device, str(dtype).removeprefix("torch."))
            backbone = copy.deepcopy(system1)
            head = system1.get_output_embeddings()
            head.weight = torch.nn.Parameter(head.weight.detach().clone())  # untied for `scale_logits`
        separate = ProcessVerifier.from_backbone(backbone.base_model, "").eval()
        backbone = lora.clone_sharing_weights(system1.base_model)
        shared = ProcessVerifier.from_backbone(backbone, "", VerifierSpec(kind="lora", lora_r=config.lora_r)).eval()
    for verifier in (separate, shared):
        for name, parameter in verifier.named_parameters():
            if "lora_B" in name or name == "score.weight":  # zero or not initialized yet
                torch.nn.init.normal_(parameter, std=0.02)
    return system1, separate, shared


def prefix_verifier(separate: ProcessVerifier) -> ProcessVerifier:
    """One that reads no candidates, on the weights of `separate`; its input embedding is as good as any for speed."""
    backbone = lora.clone_sharing_weights(separate.backbone)
    verifier = ProcessVerifier.from_backbone(backbone, "", VerifierSpec(kind="prefix")).eval()
    if verifier.score is not None:  # None where System 1 ties its embeddings, which then are the scores'
        verifier.score.weight = separate.get_input_embeddings().weight
    return verifier


def prefix_head(system1: PreTrainedModel) -> ProcessVerifier:
    """A bilinear head of rank 8 on System 1's own weights; its random scores are as good as any for speed."""
    with system1.device:
        backbone = lora.clone_sharing_weights(system1.base_model)
        return ProcessVerifier.from_backbone(backbone, "", VerifierSpec(kind="bilinear")).eval()


def scale_logits(system1: PreTrainedModel, prompts: list[list[int]], config: DecodeBenchmark) -> None:
    """Scale the output head so that `choice_share` of System 1's greedy steps have more than one candidate.

    Scaling moves no argmax, so the greedy text stays the same and the scale follows from the logit gaps along it.
    """
    completions = Decoder(system1).decode(
        prompts[:CALIBRATED], max_new_tokens=config.new_tokens, eos=[], trace=True, keep_logits=True
    )
    top = torch.stack([token.logits.raw.topk(2).values for (completion,) in completions for token in completion.trace])
    gap = (top[:, 0] - top[:, 1]).quantile(config.choice_share).item()
    system1.get_output_embeddings().weight.data *= -math.log(config.alpha) / gap


def benchmark_cases(
    config: DecodeBenchmark,
    system1: PreTrainedModel,
    separate: ProcessVerifier,
    shared: ProcessVerifier,
    prompts: list[list[int]],
) -> list[BenchmarkCase]:
    """All cases of one batch size."""
    options, on_gpu = config.guidance_kwargs(), system1.device.type == "cuda"
    guided = {
        "LLM2, no verifier": None,
        "LLM2, separate verifier at every token": Guidance(verifier=separate, **options, lazy=False),
        SEPARATE: Guidance(verifier=separate, **options),
        SHARED: Guidance(verifier=shared, **options),
        "LLM2, separate verifier of prefixes": Guidance(verifier=prefix_verifier(separate), **options),
        "LLM2, prefix head": Guidance(verifier=prefix_head(system1), **options),
    }
    decoders = {name: Decoder(system1, guidance) for name, guidance in guided.items()}
    if config.float16_weights:
        decoders |= {
            f"{name}, float16 weights": Decoder(system1, guidance, float16_weights=True)
            for name, guidance in guided.items()
        }
    runs: dict[str, Callable[[], float]] = {GENERATE: lambda: generate(system1, prompts, config)}
    if on_gpu and config.graphs:
        guidance = Guidance(verifier=shared, **options)
        decoders[f"{SHARED}, CUDA graphs"] = Decoder(system1, guidance, graphs=True)
    if on_gpu:
        runs[COMPILED] = lambda: generate(system1, prompts, config, cache_implementation="static")
    for name, decoder in decoders.items():
        runs[name] = lambda decoder=decoder: decode(decoder, prompts, config)
    if len(prompts) == 1:
        uncached = Guidance(verifier=separate, **options)
        runs["the method as published, no cache"] = lambda: len(naive(system1, uncached, prompts[0], config.new_tokens))
    baseline = COMPILED if on_gpu else GENERATE
    return [
        BenchmarkCase(
            name=name,
            run=run,
            unit="tokens/s",
            batch_size=len(prompts),
            ratio_to=None if name == baseline else baseline,
            extra=verifier_use(decoders[name], prompts, config) if name in decoders else {},
        )
        for name, run in runs.items()
    ]


def generate(system1: PreTrainedModel, prompts: list[list[int]], config: DecodeBenchmark, **options) -> float:
    ids = torch.tensor(prompts, device=system1.device)
    sequences = system1.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=config.new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return sequences[:, ids.shape[1] :].numel()


def decode(decoder: Decoder, prompts: list[list[int]], config: DecodeBenchmark) -> float:
    completions = decoder.decode(prompts, max_new_tokens=config.new_tokens, eos=[], batch_size=len(prompts))
    return sum(len(completion.token_ids) for (completion,) in completions)


def verifier_use(decoder: Decoder, prompts: list[list[int]], config: DecodeBenchmark) -> dict[str, float]:
    """Verifier forwards and candidates per step, and the share of steps with a choice; empty without a verifier."""
    if decoder.guidance is None:
        return {}
    decoder.counts.clear()
    options = {"max_new_tokens": config.new_tokens, "eos": [], "batch_size": len(prompts)}
    completions = decoder.decode(prompts, **options, trace=True)
    sizes = [len(token.candidates) for (completion,) in completions for token in completion.trace]
    return {
        "verifier_forwards": decoder.counts["system2_forwards"] / (len(sizes) / len(prompts)),
        "candidates": sum(sizes) / len(sizes),
        "choice_share": sum(size > 1 for size in sizes) / len(sizes),
    }


class HostReads(TorchFunctionMode):
    """Counts calls that wait for the device: copies to the host, copies of lists to the device, and operators with an
    output whose size depends on values. On a CPU the few calls on tensors that live there in any case count too.
    """

    CALLS = {torch.bincount, torch.nonzero, *(getattr(torch.Tensor, name) for name in WAITING)}

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.count = device, 0

    def __torch_function__(self, function: Callable, types, arguments=(), options=None):
        options = options or {}
        if function in self.CALLS:
            self.count += arguments[0].device.type == self.device.type
        elif function is torch.tensor:
            self.count += torch.device(options.get("device", "cpu")).type == self.device.type
        return function(*arguments, **options)


def layout_counts(decoder: Decoder, config: DecodeBenchmark) -> dict[str, float]:
    """See LAYOUT; on a CPU the layout for CUDA graphs is the one of a GPU."""
    rows, base = 16, config.prompt_tokens
    vocabulary = decoder.state.lm.body.config.vocab_size
    generator = torch.Generator().manual_seed(config.seed)
    lengths = torch.randint(max(1, base // 2), 2 * base + 1, (2 * rows,), generator=generator).tolist()
    lengths[rows // 2] = 8 * base  # one long prompt among the others
    prompts = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
    runners = {runner for runner in (decoder.state.lm, decoder.state.verifier) if runner is not None}
    reads = {}
    for traced in (False, True):
        limits = [config.new_tokens // 2 + index % config.new_tokens for index in range(len(prompts))]
        decoder.counts.clear()
        for runner in runners:
            runner.counts.clear()
        with HostReads(decoder.state.lm.device) as host:
            decoder.decode(
                prompts,
                max_new_tokens=2 * config.new_tokens,
                eos=[],
                batch_size=rows,
                stop=lambda prompt, sample, new, limits=limits: len(new) >= limits[prompt],
                trace=traced,
            )
        reads[traced] = host.count / decoder.counts["system1_forwards"]
    counts = sum((runner.counts for runner in runners), Counter())
    return {
        "host_reads": reads[False],
        "traced_host_reads": reads[True],
        "padding": counts["tokens"] / (decoder.counts["system1_tokens"] + decoder.counts["system2_tokens"]),
        "replayed": counts["replayed"] / counts["forwards"],
    }


def add_bandwidth_share(
    cases: list[BenchmarkCase], system1: PreTrainedModel, separate: ProcessVerifier, bandwidth: float
) -> None:
    """Add the share of the memory bandwidth (bytes/s) that reading weights takes, at batch size 1.

    A token reads System 1's weights once, and those of a separate verifier once per verifier forward.
    """
    for case in cases:
        forwards = case.extra.get("verifier_forwards", 0.0) if "separate" in case.name else 0.0
        bytes_per_token = weight_bytes(system1) + forwards * weight_bytes(separate.backbone)
        case.extra["bandwidth_share"] = spread(case.rates)["median"] * bytes_per_token / bandwidth


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a token reads: without an embedding table that is only looked up, a row at a time."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    only_looked_up = head is None or head.weight is not embedding
    return sum(parameter.nbytes for parameter in model.parameters()) - only_looked_up * embedding.nbytes


def memory_bandwidth(device: torch.device, size: int = 2**30, copies: int = 10) -> float:
    """Bytes per second that memory reads and writes: the fastest of `copies` copies of `size` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target, fastest = torch.empty_like(source), math.inf
    for _ in range(copies):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size / fastest


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def naive(system1: PreTrainedModel, guidance: Guidance, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy guided decoding of one sequence without a cache: every forward reads the whole sequence again."""
    ids = torch.tensor([prompt], device=system1.device)  # (1, T)
    for _ in range(new_tokens):
        logits = system1(ids, logits_to_keep=1).logits[:, -1]  # (1, V)
        candidates, valid = plausible(logits, guidance.alpha, guidance.top_k)  # (1, K)
        scores = None
        if candidates.shape[1] > 1:
            branches = torch.cat([ids.expand(candidates.shape[1], -1), candidates.T], dim=1)  # (K, T + 1)
            scores = guidance.verifier(branches).scores[:, -1][None]  # (1, K)
        guided = guided_logits(logits.gather(1, candidates), valid, scores, guidance.beta)
        ids = torch.cat([ids, candidates.gather(1, guided.argmax(dim=1, keepdim=True))], dim=1)
    return ids[0, len(prompt) :].tolist()
