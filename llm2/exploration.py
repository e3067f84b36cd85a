"""Token quality exploration: gold solutions in, triplets out.

Along each gold solution it finds the positions where System 1 has more than one plausible token, rolls out from every
one of them, and keeps as negatives the tokens whose continuations reach the right answer less often than gold's.
Equally good tokens (a paraphrase, another order of steps) are counted and left alone.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy.stats import beta
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm2.benchmarks import Problem, load_problems
from llm2.candidates import plausible
from llm2.chat import encode_chats, resolve_template
from llm2.config import ExploreConfig, as_dict, difference
from llm2.errors import UserError
from llm2.generation import Sampling
from llm2.grading import is_correct
from llm2.models import eos_ids, load_system1, load_tokenizer, pick_device
from llm2.rollouts import roll_out
from llm2.seeds import row_seed
from llm2.triplets import Triplet, record_line

CHUNK = 32  # problems explored together and then written: enough rollouts to fill the batches
FREE = ("limit", "batch_size", "device", "output")  # may differ between a run and its continuation


@dataclass(frozen=True)
class Fork:
    """A position of a gold solution where System 1 has more than one plausible token."""

    position: int
    tokens: tuple[int, ...]  # gold first, then System 1's other plausible tokens, best first


@dataclass(frozen=True)
class Gold:
    """A problem with its solution's token ids."""

    problem: Problem
    ids: list[int]  # the whole conversation
    start: int  # first token that the assistant chose
    end: int  # one past the token that ends its turn


def explore(config: ExploreConfig) -> dict:
    """Write `config.output` (and its .report.json), going on where an interrupted run stopped; returns the report."""
    output = Path(config.output)
    if output.exists():
        raise UserError(f"{output} exists already; choose another output, or delete it to explore anew")
    device = pick_device(config.device)
    tokenizer, model = load_tokenizer(config.model), load_system1(config.model, device, config.dtype)
    problems = load_problems(config.benchmark, config.split, config.limit, config.data_file)
    output.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(output.with_name(output.name + ".partial"), config)
    waiting = [problem for problem in problems if problem.id not in journal.done]

    start = time.perf_counter()
    with tqdm(total=len(problems), initial=len(problems) - len(waiting), desc="explore", unit="problem") as bar:
        explorer = Explorer(config, model, tokenizer, Pace(bar))
        for index in range(0, len(waiting), CHUNK):
            for entry in explorer.explore(waiting[index : index + CHUNK]):
                journal.add(entry)
                bar.update()
    report = journal.publish(output, [problem.id for problem in problems])
    report["seconds"] = time.perf_counter() - start
    output.with_name(output.name + ".report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


class Pace:
    """Tokens a second, beside a progress bar; shown once a second, since problems are finished in chunks."""

    def __init__(self, bar: tqdm) -> None:
        self.bar, self.tokens = bar, 0
        self.started = self.shown = time.perf_counter()

    def __call__(self, tokens: int) -> None:
        self.tokens += tokens
        now = time.perf_counter()
        if now - self.shown >= 1:
            self.shown = now
            self.bar.set_postfix_str(f"{self.tokens / (now - self.started):,.0f} tokens/s")


class Explorer:
    """System 1 with all it needs to judge its own plausible tokens."""

    def __init__(
        self,
        config: ExploreConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        on_tokens: Callable[[int], None],
    ) -> None:
        self.config, self.model, self.tokenizer, self.on_tokens = config, model, tokenizer, on_tokens
        self.template = resolve_template(config.chat_template)
        self.eos = eos_ids(model, tokenizer)

    def explore(self, problems: Sequence[Problem]) -> Iterator[dict]:
        """One journal entry a problem: its line of triplets and its counts."""
        golds = encode_golds(problems, self.tokenizer, self.template, self.eos)
        forks = [find_forks(self.model, gold, self.config.alpha, self.config.top_k) for gold in golds]
        hits, generated = self.judge(golds, forks)
        for gold, own in zip(golds, forks, strict=True):
            quality = {
                (fork.position, token): hits[gold.problem.id, fork.position, token]
                for fork in own
                for token in fork.tokens
            }
            yield entry_of(gold, own, quality, self.config, generated[gold.problem.id])

    def judge(self, golds: Sequence[Gold], forks: Sequence[Sequence[Fork]]) -> tuple[dict, Counter]:
        """Right answers among the rollouts of each (problem, position, token), and tokens generated a problem."""
        config, n = self.config, self.config.rollouts
        branches = [
            (gold, fork.position, token)
            for gold, own in zip(golds, forks, strict=True)
            for fork in own
            for token in fork.tokens
        ]
        # A token that ends the turn has nothing to roll out: what stands before it is the answer.
        open_branches = [branch for branch in branches if branch[2] not in self.eos]
        continuations = roll_out(
            self.model,
            [[*gold.ids[:position], token] for gold, position, token in open_branches],
            [
                [row_seed(config.seed, gold.problem.id, position, token, i) for i in range(n)]
                for gold, position, token in open_branches
            ],
            sampling=Sampling(temperature=config.temperature, top_p=config.top_p),
            max_new_tokens=config.max_new_tokens,
            eos=self.eos,
            batch_size=config.batch_size,
            on_tokens=self.on_tokens,
        )
        rolled_out = iter(continuations)
        hits, generated = {}, Counter()
        for gold, position, token in branches:
            tails = [[]] * n if token in self.eos else next(rolled_out)
            begun = [*gold.ids[gold.start : position], token]
            texts = self.tokenizer.batch_decode([begun + tail for tail in tails], skip_special_tokens=True)
            hits[gold.problem.id, position, token] = sum(is_correct(text, gold.problem.gold) for text in texts)
            generated[gold.problem.id] += sum(map(len, tails))
        return hits, generated


def encode_golds(
    problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, template: str | None, eos: Sequence[int]
) -> list[Gold]:
    """Raises UserError where the prompt's tokens do not begin those of the whole conversation."""
    whole = encode_chats(tokenizer, [problem.conversation for problem in problems], template)
    prompts = encode_chats(tokenizer, [problem.prompt for problem in problems], template, generation_prompt=True)
    golds = []
    for problem, ids, prompt in zip(problems, whole, prompts, strict=True):
        start = len(prompt)
        if ids[:start] != prompt:
            raise UserError(
                f"problem {problem.id}: the chat template writes another prompt before generation than in the whole "
                "conversation; expected one that only appends (llama3-plain or chatml-plain)"
            )
        end = next((i + 1 for i in range(start, len(ids)) if ids[i] in eos), len(ids))
        golds.append(Gold(problem, ids, start, end))
    return golds


@torch.inference_mode()
def find_forks(model: PreTrainedModel, gold: Gold, alpha: float, top_k: int | None) -> list[Fork]:
    """Positions of the solution where more than one token is plausible. Gold is among `tokens` in any case."""
    ids = torch.tensor([gold.ids[: gold.end]], device=model.device)
    logits = model(ids, use_cache=False, logits_to_keep=gold.end - gold.start + 1).logits[0, :-1].float()
    candidates, valid = plausible(logits, alpha, top_k)  # one row a position
    forks = []
    for offset in (valid.sum(-1) > 1).nonzero().flatten().tolist():
        position = gold.start + offset
        others = [t for t in candidates[offset][valid[offset]].tolist() if t != gold.ids[position]]
        forks.append(Fork(position, (gold.ids[position], *others)))
    return forks


@cache
def probability_worse(hits: int, gold_hits: int, rollouts: int, margin: float) -> float:
    """P(gold's quality - the token's quality > margin), both with a uniform prior and `rollouts` trials.

    The posterior of a share after h hits in n independent trials is Beta(1 + h, 1 + n - h); the probability is the
    integral over gold's quality of its density times the token's distribution function at `margin` below.
    """
    grid = (np.arange(2_000) + 0.5) / 2_000
    density = beta.pdf(grid, 1 + gold_hits, 1 + rollouts - gold_hits)
    below = beta.cdf(grid - margin, 1 + hits, 1 + rollouts - hits)
    return float((density * below).mean())


def entry_of(
    gold: Gold, forks: Sequence[Fork], hits: dict[tuple[int, int], int], config: ExploreConfig, generated: int
) -> dict:
    """The problem's triplets with both qualities, and what was counted on the way."""
    n, triplets, quality = config.rollouts, [], []
    for fork in forks:
        gold_token, *others = fork.tokens
        gold_hits = hits[fork.position, gold_token]
        for token in others:
            own = hits[fork.position, token]
            if probability_worse(own, gold_hits, n, config.margin) >= config.confidence:
                triplets.append(Triplet(fork.position, gold_token, token))
                quality.append([gold_hits / n, own / n])
    candidates = sum(len(fork.tokens) for fork in forks)
    counts = {
        "problems": 1,
        "positions": gold.end - gold.start,
        "forks": len(forks),
        "candidates": candidates,
        "rollouts": candidates * n,
        "generated_tokens": generated,
        "triplets": len(triplets),
        "rejected": candidates - len(forks) - len(triplets),
    }
    line = record_line(gold.problem.conversation, triplets, id=gold.problem.id, quality=quality, rollouts=n)
    return {"id": gold.problem.id, "line": line, "counts": counts}


class Journal:
    """What an exploration has finished, on disk line by line, so that a killed run goes on where it stopped."""

    def __init__(self, path: Path, config: ExploreConfig) -> None:
        self.path, self.done = path, {}
        if path.exists():
            self._recover(config)
        else:
            path.write_text(json.dumps(as_dict(config)) + "\n")
        self.file = path.open("a")

    def _recover(self, config: ExploreConfig) -> None:
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]  # a kill may have left half a line
        first, *lines = whole.decode().splitlines() or ["{}"]
        if change := difference(json.loads(first), config, FREE):
            raise UserError(
                f"{self.path} was begun with another config: {change}; choose another output, or delete that file"
            )
        self.done = {entry["id"]: entry for entry in map(json.loads, lines)}
        self.path.write_bytes(whole)

    def add(self, entry: dict) -> None:
        self.done[entry["id"]] = entry
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

    def publish(self, output: Path, order: Sequence[str]) -> dict:
        """Write the triplets in the problems' order, drop the journal, return the summed counts."""
        self.file.close()
        entries = [self.done[name] for name in order]
        total = Counter()
        for entry in entries:
            total.update(entry["counts"])
        if not total["triplets"]:
            raise UserError(f"no triplets in {len(entries)} problems: System 1 is never or always right at its forks")
        temporary = output.with_name(output.name + ".tmp")
        temporary.write_text("".join(entry["line"] for entry in entries if entry["counts"]["triplets"]))
        temporary.replace(output)
        self.path.unlink()
        return dict(total)
