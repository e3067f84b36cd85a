"""How fast and how lean a training step is: `python -m llm2 benchmark configs/benchmark/train.yaml`.

    packed          one forward and backward for all pairs of a step, as VerifierTrainer makes them
    plain           each pair as two whole sequences, padded to one batch; the score is read at each one's end
    bare backbone   a forward and backward of as many tokens with plain causal attention: the floor

The optimizer takes part in none of them. Reading and checking a file of triplets is timed beside them.
"""

import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from llm2.benchmarks.configs import TrainBenchmark
from llm2.benchmarks.runner import BenchmarkCase, markdown_table, rows, run_interleaved, spread, write_results
from llm2.benchmarks.shapes import llama_shape
from llm2.common.chat import encode_chats
from llm2.common.config_file import as_dict
from llm2.common.loading import load_tokenizer, resolve_device
from llm2.testbed.generator import gold_solution, stories
from llm2.verifier.collate import VerifierBatch, verifier_batch
from llm2.verifier.loss import pairwise_loss
from llm2.verifier.masks import BLOCK
from llm2.verifier.model import ProcessVerifier, ProcessVerifierConfig
from llm2.verifier.triplets import Example, Triplet, load_examples, record_line

MIB = 2**20
TESTBED = Path(__file__).parent.parent / "testbed" / "system1"
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bfloat16, by the maker's data sheets


def measure(config: TrainBenchmark) -> str:
    """Run every row, write the JSON file, return the table."""
    device = resolve_device(config.device)
    steps = [row for count in config.solutions for row in step_rows(config, count, device)]
    with tempfile.TemporaryDirectory() as folder:
        readers = read_rows(config, Path(folder))
        for row in tqdm(steps, desc="peak memory", unit="row"):
            row.peak_mib = peak_of_step(row.run, device)
        for row in readers:
            row.peak_mib = growth_while(row.run)
        run_interleaved([*steps, *readers], config.rounds, "training")
    if device.type == "cuda":
        note_utilisation(steps, config)
    found = rows([*steps, *readers])
    write_results(Path(config.output), config.rounds, found, config=as_dict(config))
    return markdown_table(found, ["tokens", "mfu"])


@dataclass(frozen=True)
class Step:
    """What one training step is made of, in every way to make it."""

    config: TrainBenchmark
    examples: list[Example]
    packed: ProcessVerifier  # with the attention that training uses
    causal: ProcessVerifier  # the same shape, with SDPA

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
        longest = max(map(len, sequences))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in sequences], device=self.causal.device)
        end = torch.tensor(ends, device=ids.device)
        mask = torch.arange(longest, device=ids.device) <= end[:, None]
        scores = self.causal(ids, mask.long()).scores.gather(1, end[:, None]).view(-1, 2)  # gold, negative
        margins = scores[:, 0] - scores[:, 1]
        self.finish(self.causal, pairwise_loss(margins, torch.ones_like(margins)))

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


def step_rows(config: TrainBenchmark, solutions: int, device: torch.device) -> list[BenchmarkCase]:
    """The cases at so many solutions a step; the plain way at the first of `config.solutions` alone."""
    step = make_step(config, solutions, device)
    pairs, tokens = solutions * config.pairs, step.batch().input_ids.numel()

    def case(name: str, run: Callable[[], None], units: int, unit: str, ratio_to: str | None) -> BenchmarkCase:
        def timed() -> float:
            run()
            return units

        return BenchmarkCase(name, timed, unit, solutions, ratio_to, extra={"tokens": tokens})

    made = [
        case("bare backbone", step.run_bare, tokens, "tokens/s", None),
        case("packed, by tokens", step.run_packed, tokens, "tokens/s", "bare backbone"),
    ]
    if solutions == config.solutions[0]:
        plain = case("plain", step.run_plain, pairs, "pairs/s", None)
        plain.extra["tokens"] = 2 * pairs * config.tokens
        made += [plain, case("packed, by pairs", step.run_packed, pairs, "pairs/s", "plain")]
    return made


def make_step(config: TrainBenchmark, solutions: int, device: torch.device) -> Step:
    """Random solutions whose pairs are evenly spread, the last one at the last token; random weights."""
    generator = torch.Generator().manual_seed(config.seed)
    places = [config.tokens * (i + 1) // config.pairs - 1 for i in range(config.pairs)]
    examples = []
    for _ in range(solutions):
        ids = torch.randint(config.vocab_size, (config.tokens,), generator=generator).tolist()
        examples.append(Example(ids, [Triplet(p, ids[p], (ids[p] + 1) % config.vocab_size) for p in places]))
    shape = llama_shape(config, 2 * config.tokens)

    def model(attention: str) -> ProcessVerifier:
        torch.manual_seed(config.seed)
        with torch.device(device):
            made = ProcessVerifier(ProcessVerifierConfig(shape, attn_implementation=attention))
        return made.to(getattr(torch, config.dtype)).train()

    causal = model("sdpa")
    return Step(config, examples, model("flex_attention") if device.type == "cuda" else causal, causal)


def peak_of_step(run: Callable[[], float], device: torch.device) -> float:
    """Most memory that tensors take in a step beyond the weights: activations and gradients, in MiB."""
    run()  # what is allocated once is no part of a step
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    taken = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()  # negative where memory is given back
        most = max(most, taken)
    return most / MIB


def note_utilisation(steps: list[BenchmarkCase], config: TrainBenchmark) -> None:
    """Model FLOPs utilisation of the rows in tokens/s, on a GPU whose peak is known.

    A token costs 6 FLOPs a weight of the layers, and 12 times width times what it sees, half the solution on average,
    a layer (Chowdhery et al., arXiv 2204.02311, appendix B); masked-out attention counts for nothing.
    """
    name = torch.cuda.get_device_name()
    peak = next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    projections = width * (2 * width + 2 * head * config.num_key_value_heads + 3 * config.intermediate_size)
    flops = config.num_hidden_layers * (6 * projections + 12 * width * config.tokens / 2)
    for row in steps:
        if peak is not None and row.unit == "tokens/s":
            row.extra["mfu"] = spread(row.rates)["median"] * flops / peak


def read_rows(config: TrainBenchmark, folder: Path) -> list[BenchmarkCase]:
    """Checking and tokenizing files of a quarter of the lines and of all of them: memory is to be the same."""
    tokenizer = load_tokenizer(str(TESTBED))
    made = []
    for lines in (config.lines // 4, config.lines):
        path = folder / f"{lines}.jsonl"
        tokens = write_lines(path, tokenizer, lines, config.pairs)

        def read(path: Path = path, lines: int = lines) -> float:
            load_examples(path, tokenizer)
            return lines

        made.append(BenchmarkCase(f"check {lines:,} lines", read, "lines/s", 1, extra={"tokens": tokens}))
    return made


def write_lines(path: Path, tokenizer, lines: int, pairs: int) -> int:
    """Conversations of three of the testbed's problems each, about 200 tokens; returns all their tokens."""
    drawn, tokens = stories("train"), 0
    with path.open("w") as file:
        for _ in range(lines):
            told = list(islice(drawn, 3))
            messages = [
                {"role": "user", "content": " ".join(story.question for story in told)},
                {"role": "assistant", "content": " ".join(gold_solution(story) for story in told)},
            ]
            ids = encode_chats(tokenizer, [messages])[0]
            places = [len(ids) // 2 + len(ids) * i // (2 * pairs) for i in range(pairs)]
            file.write(record_line(messages, [Triplet(p, ids[p], (ids[p] + 1) % len(tokenizer)) for p in places]))
            tokens += len(ids)
    return tokens


def growth_while(run: Callable[[], float]) -> float | None:
    """By how much the process's resident memory grows at most while `run` runs, in MiB; None where it is not told."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    run()  # what is loaded once is no part of it

    def resident() -> float:
        return int(statm.read_text().split()[1]) * 4096 / MIB

    before, most, done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], resident() - before)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return most[0]
