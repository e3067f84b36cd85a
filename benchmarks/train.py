"""Speed and memory of a training step, in three variants:

    packed          one forward and backward for all pairs of a step, as in VerifierTrainer
    plain           each pair as two whole sequences, padded to one batch, scored at their last tokens
    bare backbone   forward and backward of as many tokens with plain causal attention: the lower bound

None includes the optimizer. Checking and tokenizing a triplets file is measured too.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import LlamaConfig, PreTrainedTokenizerBase

from benchmarks.configs import TrainBenchmark
from benchmarks.runner import BenchmarkCase, peak_memory, report, resident_mib, run_interleaved, spread
from llm2.common.chat import encode_chats
from llm2.common.loading import load_tokenizer, resolve_device
from llm2.common.peak_memory import MIB
from llm2.tasks import load_task
from llm2.verifier.collate import VerifierBatch, verifier_batch
from llm2.verifier.loss import pairwise_loss
from llm2.verifier.masks import BLOCK
from llm2.verifier.model import ProcessVerifier, ProcessVerifierConfig
from llm2.verifier.triplets import Example, Triplet, load_examples, record_line

PLAIN_TOKENS = 16_384  # of a forward of the plain step: in the shape of a 1B model about 35 GB of activations
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bfloat16, from NVIDIA's data sheets


def measure(config: TrainBenchmark) -> str:
    """Measure every case, write `config.output`, return the table."""
    device = resolve_device(config.device)
    steps = [case for solutions in config.solutions for case in step_cases(config, solutions, device)]
    with tempfile.TemporaryDirectory() as folder:
        readers = read_cases(config, Path(folder))
        for case in tqdm(steps, desc="peak memory", unit="case"):
            case.peak_mib = peak_of_step(case.run, device)
        for case in readers:
            case.run()  # loads what stays in memory
            before = resident_mib()
            case.peak_mib = peak_memory(case.run, torch.device("cpu")) - before
        run_interleaved([*steps, *readers], config, "training", columns=["tokens"])
    if device.type == "cuda":
        add_mfu(steps, config)
    return report(config, [*steps, *readers], ["tokens", "mfu"])


@dataclass(frozen=True)
class TrainStep:
    """One training step in all variants."""

    examples: list[Example]
    packed: ProcessVerifier  # with the attention implementation that training uses
    causal: ProcessVerifier  # the same weights, with SDPA

    def batch(self) -> VerifierBatch:
        flex = self.packed.device.type == "cuda"
        return verifier_batch(self.examples, capacity=sys.maxsize if flex else None, multiple=BLOCK if flex else 1)

    def run_packed(self) -> None:
        device = self.packed.device
        batch = VerifierBatch(*(t if t is None else t.to(device) for t in self.batch()))
        inputs = {"start": batch.start, "prefix_len": batch.prefix_len, "pair_indices": batch.pair_indices}
        output = self.packed(batch.input_ids, **inputs)
        self.finish(self.packed, pairwise_loss(output.margins, batch.pair_weights))

    def run_plain(self) -> None:
        ends, sequences = [], []
        for example in self.examples:
            for position, gold, negative in example.triplets:
                sequences += [[*example.ids[:position], token] for token in (gold, negative)]
                ends += [position, position]
        longest, device = max(map(len, sequences)), self.causal.device
        rows, total = max(1, PLAIN_TOKENS // (2 * longest)), torch.tensor(len(ends) / 2, device=device)
        for first in range(0, len(ends), 2 * rows):
            group = slice(first, first + 2 * rows)
            ids = [tokens + [0] * (longest - len(tokens)) for tokens in sequences[group]]
            end = torch.tensor(ends[group], device=device)
            mask = torch.arange(longest, device=device) <= end[:, None]
            scores = self.causal(torch.tensor(ids, device=device), mask.long()).scores.gather(1, end[:, None])
            margins = scores[::2] - scores[1::2]  # gold, negative
            loss = pairwise_loss(margins, torch.ones_like(margins), total)
            if group.stop < len(ends):
                loss.backward()
        self.finish(self.causal, loss)

    def run_bare(self) -> None:
        ids = self.batch().input_ids.to(self.causal.device)
        hidden = self.causal.backbone(ids, use_cache=False).last_hidden_state
        self.finish(self.causal, hidden.float().mean())

    @staticmethod
    def finish(model: ProcessVerifier, loss: torch.Tensor) -> None:
        loss.backward()
        model.zero_grad(set_to_none=True)
        if loss.is_cuda:
            torch.cuda.synchronize()


def step_cases(config: TrainBenchmark, solutions: int, device: torch.device) -> list[BenchmarkCase]:
    """The variants of a step with this many solutions; plain only for the first of `config.solutions`."""
    step = make_step(config, solutions, device)
    pairs, tokens = solutions * config.pairs, step.batch().input_ids.numel()

    def case(
        name: str, run: Callable[[], None], unit: str, ratio_to: str | None = None, read: int = tokens
    ) -> BenchmarkCase:
        def counted() -> float:
            run()
            return tokens if unit == "tokens/s" else pairs

        return BenchmarkCase(name, counted, unit, solutions, ratio_to, extra={"tokens": read})

    cases = [
        case("bare backbone", step.run_bare, "tokens/s"),
        case("packed, by tokens", step.run_packed, "tokens/s", "bare backbone"),
    ]
    if solutions == config.solutions[0]:
        cases.append(case("plain", step.run_plain, "pairs/s", read=2 * pairs * config.tokens))
        cases.append(case("packed, by pairs", step.run_packed, "pairs/s", "plain"))
    return cases


def make_step(config: TrainBenchmark, solutions: int, device: torch.device) -> TrainStep:
    """Random weights and random solutions; a solution's pairs are evenly spread, the last at its last token."""
    generator = torch.Generator().manual_seed(config.seed)
    positions = [config.tokens * (i + 1) // config.pairs - 1 for i in range(config.pairs)]
    examples = []
    for _ in range(solutions):
        ids = torch.randint(config.vocab_size, (config.tokens,), generator=generator).tolist()
        examples.append(Example(ids, make_triplets(ids, positions, config.vocab_size)))
    shape = LlamaConfig(**config.shape(), max_position_embeddings=2 * config.tokens)

    def model(attention: str) -> ProcessVerifier:
        torch.manual_seed(config.seed)
        with torch.device(device):
            verifier = ProcessVerifier(ProcessVerifierConfig(shape, attn_implementation=attention))
        return verifier.to(getattr(torch, config.dtype)).train()

    causal = model("sdpa")
    return TrainStep(examples, model("flex_attention") if device.type == "cuda" else causal, causal)


def make_triplets(ids: Sequence[int], positions: Sequence[int], vocab_size: int) -> list[Triplet]:
    """Triplets at these positions, each with the id after gold's as its negative."""
    return [Triplet(position, ids[position], (ids[position] + 1) % vocab_size) for position in positions]


def peak_of_step(run: Callable[[], float], device: torch.device) -> float:
    """Peak memory of a step's tensors beyond the weights, activations and gradients, in MiB."""
    run()  # allocates what stays between steps
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()  # negative for freed memory
        peak = max(peak, allocated)
    return peak / MIB


def add_mfu(steps: list[BenchmarkCase], config: TrainBenchmark) -> None:
    """Add the model FLOPs utilization of the cases in tokens/s, on a GPU whose peak is known.

    Per token 6 FLOPs for each weight of the layers and, in each layer, 12 * width * context length, which is half a
    solution on average (Chowdhery et al., arXiv 2204.02311, appendix B); masked-out attention does not count.
    """
    gpu = torch.cuda.get_device_name()
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), None)
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    projections = width * (2 * width + 2 * head * config.num_key_value_heads + 3 * config.intermediate_size)
    flops = config.num_hidden_layers * (6 * projections + 12 * width * config.tokens / 2)
    for case in steps:
        if peak is not None and case.unit == "tokens/s":
            case.extra["mfu"] = spread(case.rates)["median"] * flops / peak


def read_cases(config: TrainBenchmark, folder: Path) -> list[BenchmarkCase]:
    """Checking and tokenizing a file with a quarter of the lines and one with all: memory should not grow."""
    tokenizer = load_tokenizer("testbed")
    cases = []
    for lines in (config.lines // 4, config.lines):
        path = folder / f"{lines}.jsonl"
        tokens = write_lines(path, tokenizer, lines, config.pairs)

        def read(path: Path = path, lines: int = lines) -> float:
            load_examples(path, tokenizer)
            return lines

        cases.append(BenchmarkCase(f"check {lines:,} lines", read, "lines/s", 1, extra={"tokens": tokens}))
    return cases


def write_lines(path: Path, tokenizer: PreTrainedTokenizerBase, lines: int, pairs: int) -> int:
    """Write conversations of three testbed problems, about 200 tokens each; returns the total number of tokens."""
    problems, tokens = iter(load_task("testbed").problems("train", 3 * lines)), 0
    with path.open("w", encoding="utf-8") as file:
        for _ in range(lines):
            drawn = list(islice(problems, 3))
            messages = [
                {"role": "user", "content": " ".join(problem.question for problem in drawn)},
                {"role": "assistant", "content": " ".join(problem.solution for problem in drawn)},
            ]
            (ids,), (prompt,) = encode_chats(tokenizer, [messages]), encode_chats(tokenizer, [messages[:1]], None, True)
            positions = [len(prompt) + (len(ids) - len(prompt)) * i // pairs for i in range(pairs)]
            file.write(record_line(messages, make_triplets(ids, positions, len(tokenizer))))
            tokens += len(ids)
    return tokens
