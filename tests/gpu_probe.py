"""What only a GPU can settle, in parts of less than four minutes each; prints as it goes.

    python tests/gpu_probe.py env     versions, and which known faults apply to them
    python tests/gpu_probe.py sdpa    first and second call of attention in 30 shapes, torch's kernels and ours
    python tests/gpu_probe.py exact   replayed graphs against eager forwards, guided tokens against the slow reference
    python tests/gpu_probe.py step    kernels, waits, idle time and replays of a decoding step

Needs torch, transformers and peft alone. `--tiny` runs the same code with a tiny model, on a CPU too.
"""

import argparse
import dataclasses
import gc
import sys
import time
import types
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))
try:
    import pydantic  # noqa: F401
except ImportError:  # what llm2.config takes from it, without the checks
    stand_in = types.ModuleType("pydantic")
    stand_in.ConfigDict, stand_in.Field, stand_in.dataclasses = dict, lambda **limits: None, types.ModuleType("d")
    stand_in.dataclasses.dataclass = lambda config=None, **options: dataclasses.dataclass(**options)
    sys.modules |= {"pydantic": stand_in, "pydantic.dataclasses": stand_in.dataclasses}

from reference import decode_one

from llm2.config import VerifierSpec
from llm2.decoding.decoder import Decoder
from llm2.decoding.model_runner import KERNELS
from llm2.decoding.sampling import Guidance
from llm2.verifier import lora
from llm2.verifier.model import ProcessVerifier

ONE_B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
ONE_B |= {"num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 4096}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 4096}
GUIDED = {"alpha": 0.1, "beta": 2.0}


def say(*parts) -> None:
    print(*parts, flush=True)


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def systems(shape: dict, device: torch.device, dtype: torch.dtype, rank: int | None = None):
    """System 1 and a verifier, both random: with separate weights, or a LoRA of this rank.

    System 1's logits are scaled to a standard deviation of 20, so that some steps have several candidates."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape, initializer_range=0.05, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    with device:
        model, other = (transformers.LlamaForCausalLM(config).to(dtype).eval() for _ in range(2))
        backbone = other.model if rank is None else lora.clone_sharing_weights(model.model)
        spec = VerifierSpec() if rank is None else VerifierSpec(kind="lora", lora_r=rank)
        verifier = ProcessVerifier.from_backbone(backbone, "", spec).eval()
        model.lm_head.weight.data *= 400 / shape["hidden_size"] ** 0.5
        for name, parameter in verifier.named_parameters():
            if "lora_B" in name or name == "score.weight":
                torch.nn.init.normal_(parameter, std=0.05)
    return model, verifier


def prompts(count: int, shape: dict, shortest: int, longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, shape["vocab_size"], (length,), generator=generator).tolist() for length in lengths]


def env(device: torch.device, tiny: bool) -> None:
    say("torch", torch.__version__, "transformers", transformers.__version__, "CUDA", torch.version.cuda)
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    say("a failed capture damages the allocator (torch <= 2.11):", version <= (2, 11))
    say(
        "destroying a graph may free cuBLAS' workspace for its stream (torch 2.12, 2.13):",
        (2, 12) <= version <= (2, 13),
    )
    if device.type == "cuda":
        properties, (free, total) = torch.cuda.get_device_properties(device), torch.cuda.mem_get_info()
        say(properties.name, f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free", "cuDNN", torch.backends.cudnn.version())
        say("torch prefers cuDNN's attention:", properties.major == 9 and torch.backends.cuda.cudnn_sdp_enabled())


def sdpa(device: torch.device, tiny: bool) -> None:
    """A decoding step's attention: R sequences, 8 key heads, 4 query heads each, a bias over W positions."""
    dtype, slowest = torch.bfloat16 if device.type == "cuda" else torch.float32, {"torch": 0.0, "ours": 0.0}
    for rows in (1, 2) if tiny else (1, 16, 64):
        for width in range(64, 704, 64):
            line = [f"R {rows:3} W {width:3}"]
            query = torch.randn(rows, 8, 4, 64, device=device, dtype=dtype)
            keys = torch.randn(rows, 8, width, 64, device=device, dtype=dtype)
            bias = torch.zeros(rows, 1, 4, width, device=device, dtype=dtype)
            for name, context in (("torch", nullcontext()), ("ours", sdpa_kernel(KERNELS))):
                with context:
                    seconds = []
                    for _ in range(2):
                        sync(device)
                        start = time.perf_counter()
                        scaled_dot_product_attention(query, keys, keys, bias)
                        sync(device)
                        seconds.append(time.perf_counter() - start)
                    slowest[name] = max(slowest[name], seconds[0])
                    line.append(f"{name}: first {1e3 * seconds[0]:.2f} ms, second {1e3 * seconds[1]:.2f} ms")
                    if width == 64:
                        with profile() as profiled:
                            scaled_dot_product_attention(query, keys, keys, bias)
                            sync(device)
                        events = profiled.key_averages()
                        line.append(max(events, key=lambda event: event.self_device_time_total).key[:60])
            say(" | ".join(line))
    say("slowest first call:", {name: f"{1e3 * seconds:.1f} ms" for name, seconds in slowest.items()})


def forced_logits(decoder: Decoder, batch: list[list[int]], forced: torch.Tensor) -> torch.Tensor:
    """System 1's logits (prompts, steps, V) along the forced tokens (prompts, steps)."""
    kept = {}

    def force(indices, new, logits):
        for row, index in enumerate(indices):
            kept[index, len(new[row])] = logits[row].to(torch.bfloat16).cpu()
        tokens = torch.stack([forced[index, len(tokens)] for index, tokens in zip(indices, new, strict=True)])
        return torch.zeros_like(logits).scatter(1, tokens[:, None].to(logits.device), 100.0)

    decoder.decode(batch, max_new_tokens=forced.shape[1], eos=[], batch_size=12, process_logits=force)
    return torch.stack([torch.stack([kept[row, step] for step in range(forced.shape[1])]) for row in range(len(batch))])


def exact(device: torch.device, tiny: bool) -> None:
    shape, dtype = (TINY, torch.float32) if tiny else (ONE_B, torch.bfloat16)
    model, verifier = systems(shape, device, dtype)
    steps = 8 if tiny else 48
    short, mixed = prompts(12, shape, 10, 40), prompts(20, shape, 60, 200 if tiny else 700)
    forced = torch.randint(3, shape["vocab_size"], (20, steps), generator=torch.Generator().manual_seed(1))
    recorded, other = Decoder(model, graphs=True), Decoder(model, Guidance(verifier=verifier, **GUIDED), graphs=True)
    forced_logits(recorded, short, forced)  # the caches are replaced by larger ones below
    other.decode(short, max_new_tokens=steps, eos=[])
    expected, good = forced_logits(Decoder(model), mixed, forced).float(), True
    for name in ("recording", "replaying", "after the other decoder was deleted", "and again"):
        found = forced_logits(recorded, mixed, forced).float()
        difference = ((found - expected).abs().mean() / expected.std()).item()
        agree = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
        good &= difference < 0.05
        say(f"{name}: mean difference {difference:.4f} standard deviations, same argmax {agree:.3f}")
        if name == "replaying":
            del other
            gc.collect()
    say("replayed logits are those of eager forwards:", "yes" if good else "NO")
    for rank in (None, 8):
        small = TINY if tiny else {**TINY, "hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 4096}
        model, verifier = systems(small, device, torch.float32, rank)
        batch, decoder = prompts(8, small, 3, 40), Decoder(model, Guidance(verifier=verifier, **GUIDED), graphs=True)
        with device:  # the reference makes its tensors there
            twin = [decode_one(model, ids, max_new_tokens=16, eos=[], verifier=verifier, **GUIDED) for ids in batch]
        for name in ("recorded", "replayed"):
            found = [row.token_ids for (row,) in decoder.decode(batch, max_new_tokens=16, eos=[])]
            equal = sum(a == b for a, b in zip(found, twin, strict=True))
            say(f"guided, {'separate' if rank is None else 'LoRA'}, {name}: {equal} of 8 as the slow reference")


def step(device: torch.device, tiny: bool) -> None:
    on_gpu = device.type == "cuda"
    shape, dtype = (TINY, torch.float32) if tiny else (ONE_B, torch.bfloat16)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    model, verifier = systems(shape, device, dtype, rank=None)
    for rows in (1, 4) if tiny else (1, 64, 256):
        for arrivals in (False, True):
            decoder = Decoder(model, Guidance(verifier=verifier, **GUIDED), graphs=True)
            new, batch = 8 if tiny else 32, prompts(rows * (2 if arrivals else 1), shape, 60, 200)
            options = {"max_new_tokens": 2 * new, "eos": [], "batch_size": rows}
            options["stop"] = lambda index, sample, tokens: len(tokens) >= new + arrivals * (index % new)  # noqa: B023
            decoder.decode(batch, **options)
            runners = (decoder.state.lm, decoder.state.verifier)
            for counts in (decoder.counts, *(runner.counts for runner in runners)):
                counts.clear()
            sync(device)
            start = time.perf_counter()
            decoder.decode(batch, **options)
            sync(device)
            seconds, steps = time.perf_counter() - start, decoder.counts["system1_forwards"]
            forwards, replayed = (sum(runner.counts[key] for runner in runners) for key in ("forwards", "replayed"))
            with warnings.catch_warnings(record=True) as waits, profile(activities=activities) as profiled:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn") if on_gpu else None
                decoder.decode(batch, **options)
                torch.cuda.set_sync_debug_mode("default") if on_gpu else None
            kernels = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
            busy = sum(event.self_device_time_total for event in kernels) / 1e6
            say(
                f"batch {rows:3}, {'arrivals' if arrivals else 'steady':8}: {1e3 * seconds / steps:.2f} ms a step, "
                f"{decoder.counts['tokens'] / 2 / seconds:,.0f} tokens/s, {len(kernels) / steps:.0f} kernels, "
                f"{len(waits) / steps:.1f} waits, idle {1 - busy / seconds:.0%}, replayed {replayed / forwards:.0%}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["env", "sdpa", "exact", "step"])
    parser.add_argument("--tiny", action="store_true")
    chosen = parser.parse_args()
    gpu = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if gpu.type == "cpu" and not chosen.tiny and chosen.part != "env":
        sys.exit("torch sees no GPU; --tiny tries the probe itself on a CPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    globals()[chosen.part](gpu, chosen.tiny)
