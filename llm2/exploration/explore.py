"""Token quality exploration: gold solutions in, triplets out.

Along each gold solution it finds the positions where System 1 has more than one plausible token, asks `quality` which
rollouts each test still wants, and has an engine of `rollouts` write them, those of many problems at a time. Tokens
that are found worse than gold become triplets. Processes share the problems and nothing else.
"""

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llm2.common.chat import resolve_template
from llm2.common.distributed import barrier, dist_info, iter_shared_work
from llm2.common.journal import Journal
from llm2.common.loading import load_tokenizer
from llm2.common.seeds import row_seed
from llm2.config import ExploreConfig, StoppingRule
from llm2.errors import UserError
from llm2.exploration.engines import Candidate, Engine, PositionQuery, Request, open_engine
from llm2.exploration.quality import Fork, SequentialTest, reused_rollouts
from llm2.exploration.solutions import TokenizedSolution, load_solved, tokenize_solutions
from llm2.exploration.summary import summary
from llm2.tasks import Problem, Task, load_task
from llm2.verifier.triplets import Triplet, record_line

CHUNK = 16  # problems begun together
WINDOW = 8  # rollouts handed to the engine at a time, in batches: rounds of many problems keep its rows busy
BINS = 10  # of the histogram of qualities
# What may differ between a run and its continuation: none of it changes a triplet.
FREE = ("limit", "batch_size", "device", "output", "tensor_parallel", "server", "server_requests")


@dataclass
class ProblemState:
    """A problem being explored."""

    gold: TokenizedSolution
    forks: list[Fork]
    trial: SequentialTest
    counts: Counter = field(default_factory=Counter)


def explore(config: ExploreConfig) -> dict | None:
    """Write `config.output` and its side files, going on where an interrupted run stopped.

    Returns the report; in a process that is not the first one None, once its share of the problems is done.
    """
    output, partial = Path(config.output), partial_of(config)
    if output.exists() and partial.exists():  # killed after the last file was in place, before tidying up
        return _tidy(output, partial)
    task, problems, repeated = prepare(config)
    tokenizer = load_tokenizer(config.model)
    engine = open_engine(config, tokenizer)
    output.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(partial, config, may_differ=FREE, key=itemgetter("id"), shard=dist_info().rank)
    earlier = frozenset(journal.done)
    barrier()  # all have seen the same problems done before one adds to them
    waiting = [problem for problem in problems if problem.id not in earlier]

    start = time.perf_counter()
    share = len(
        waiting[:: dist_info().world_size]
    )  # of the first process: it may become another, see `iter_shared_work`
    with tqdm(total=share, desc="explore", unit="problem", disable=not dist_info().is_main) as bar:
        explorer = Explorer(config, engine, tokenizer, task, ThroughputMeter(bar))
        for entry in explorer.explore(waiting[i] for i in iter_shared_work(len(waiting))):
            journal.add(entry)
            bar.update()
        bar.total = bar.n
    engine.close()
    journal.close()
    barrier()  # every problem is in some shard
    if not dist_info().is_main:
        return None
    order = [problem.id for problem in problems]
    return write_outputs(journal, output, order, earlier, time.perf_counter() - start, repeated)


def prepare(config: ExploreConfig) -> tuple[Task, list[Problem], int]:
    """The task, the problems, how many were repetitions; every mistake that can be told without a model."""
    check(config)
    if Path(config.output).exists() and not partial_of(config).exists():
        raise UserError(f"{config.output} exists already; choose another output, or delete it to explore anew")
    task = load_task(config.task, config.data_file, config.grader)
    return task, *load_solved(config, task)


def partial_of(config: ExploreConfig) -> Path:
    """The journal's folder, beside the output."""
    return Path(config.output + ".partial")


def check(config: ExploreConfig) -> None:
    """What one field alone cannot tell."""
    if config.engine == "vllm" and config.top_k is None:
        raise UserError(
            "engine: vllm wants top_k (say 10; a server shows at most 20): it lists the likeliest tokens only"
        )
    if config.server is not None and config.engine != "vllm":
        raise UserError(f"server: found {config.server!r} with engine {config.engine}, expected engine vllm")
    if config.stop_pattern is not None:
        if config.engine != "llm2":
            raise UserError(
                f"stop_pattern: found {config.stop_pattern!r} with engine {config.engine}, expected engine llm2"
            )
        try:
            re.compile(config.stop_pattern)
        except re.error as error:
            raise UserError(f"stop_pattern: {config.stop_pattern!r} is no regular expression: {error}") from None
    if config.min_rollouts > config.max_rollouts:
        raise UserError(
            f"min_rollouts: found {config.min_rollouts}, expected at most max_rollouts={config.max_rollouts}"
        )


class ThroughputMeter:
    """Tokens a second, beside a progress bar; shown once a second, since problems are finished in rounds."""

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
    """An engine with all it takes to judge System 1's plausible tokens."""

    def __init__(
        self,
        config: ExploreConfig,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        on_tokens: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.config, self.engine, self.tokenizer = config, engine, tokenizer
        self.task, self.on_tokens = task, on_tokens
        self.template = resolve_template(config.chat_template)
        self.rule: StoppingRule = config

    def explore(self, problems: Iterable[Problem]) -> Iterator[dict]:
        """One journal entry a problem, as their last verdicts fall.

        Each round hands the engine what all active problems ask for; new problems join until that fills its window.
        """
        waiting, active = iter(problems), []
        while True:
            asked = [(case, case.trial.ask()) for case in active]
            while _rollouts(asked) < WINDOW * self.config.batch_size and (new := list(islice(waiting, CHUNK))):
                asked += [(case, case.trial.ask()) for case in self.begin(new)]
            yield from (entry_of(case, self.config) for case, asks in asked if not asks)
            asked = [(case, asks) for case, asks in asked if asks]
            if not asked:
                return
            self.generate(asked)
            active = [case for case, _ in asked]

    def begin(self, problems: Sequence[Problem]) -> list[ProblemState]:
        golds = tokenize_solutions(self.task, problems, self.tokenizer, self.template, self.engine.eos)
        plausible = self.engine.plausible([PositionQuery(gold.ids, gold.start, gold.end) for gold in golds])
        cases = []
        for gold, candidates in zip(golds, plausible, strict=True):
            forks = forks_of(gold, candidates)
            case = ProblemState(gold, forks, SequentialTest(forks, self.rule))
            for fork in forks:
                for token in fork.tokens:
                    if token in self.engine.eos:  # what stands before it is the answer: nothing to roll out
                        self.count(case, fork, token, [[]], weight=max(self.rule.gold_rollouts, self.rule.max_rollouts))
            cases.append(case)
        return cases

    def generate(self, asked: Sequence[tuple[ProblemState, dict[tuple[int, int], range]]]) -> None:
        """Write the rollouts asked for and count their outcomes."""
        rounds = [(case, *key, indices) for case, asks in asked for key, indices in asks.items()]
        greedy = self.config.temperature == 0  # one rollout then says what all of them would
        requests = [
            Request(
                case.gold.ids,
                position,
                (token,),
                [
                    row_seed(self.config.seed, case.gold.problem.id, position, token, i)
                    for i in (indices[:1] if greedy else indices)
                ],
            )
            for case, position, token, indices in rounds
        ]
        continuations = self.engine.generate(requests, self.on_tokens)
        for (case, position, token, indices), tails in zip(rounds, continuations, strict=True):
            fork = next(fork for fork in case.forks if fork.position == position)
            self.count(case, fork, token, tails, weight=len(indices) if greedy else 1)
            case.counts["rollouts"] += len(tails)
            case.counts["generated_tokens"] += sum(map(len, tails))

    def count(self, case: ProblemState, fork: Fork, token: int, tails: Sequence[Sequence[int]], weight: int) -> None:
        """Grade rollouts of a token; those of gold count for the later forks that they pass through too."""
        gold = case.gold
        begun = [*gold.ids[gold.start : fork.position], token]
        texts = self.tokenizer.batch_decode([[*begun, *tail] for tail in tails], skip_special_tokens=True)
        grades = self.task.grade(texts, gold.problem.gold)
        for right, tail in zip((grade.correct for grade in grades), tails, strict=True):
            case.trial.add(fork.position, token, right, weight)
            if token == fork.tokens[0]:
                for position, passed in reused_rollouts(gold.ids, fork.position, tail, case.forks):
                    case.trial.add(position, passed, right, weight)
                    case.counts["rollouts_passing_by"] += 1


def _rollouts(asked: Sequence[tuple[ProblemState, dict[tuple[int, int], range]]]) -> int:
    return sum(len(indices) for _, asks in asked for indices in asks.values())


def forks_of(gold: TokenizedSolution, candidates: Sequence[Sequence[Candidate]]) -> list[Fork]:
    """Positions of the solution where more than one token is plausible. The gold token is a fork's first in any case."""
    forks = []
    for position, plausible in enumerate(candidates, start=gold.start):
        if len(plausible) > 1:
            own = gold.ids[position]
            probability = dict(plausible)
            tokens = (own, *(token for token, _ in plausible if token != own))
            forks.append(Fork(position, tokens, tuple(probability.get(token, 0.0) for token in tokens)))
    return forks


def entry_of(case: ProblemState, config: ExploreConfig) -> dict:
    """The problem's line of triplets, every verdict with its evidence, and what was counted on the way."""
    tallies, pairs = case.trial.tallies, []
    for fork in case.forks:
        gold = tallies[fork.position, fork.tokens[0]]
        for token, probability in zip(fork.tokens[1:], fork.probabilities[1:], strict=True):
            own = tallies[fork.position, token]
            pairs.append(
                {
                    "triplet": Triplet(fork.position, fork.tokens[0], token),
                    "verdict": case.trial.verdicts[fork.position, token],
                    "gold": gold,  # right, rollouts
                    "token": own,
                    "probability": round(probability, 4),
                }
            )
    negatives = [pair for pair in pairs if pair["verdict"] == "negative"]
    kept = most_informative(negatives, config.max_triplets)
    verdicts = Counter(pair["verdict"] for pair in pairs)
    qualities = [tally.quality for tally in tallies.values() if tally.rollouts]
    counts = {
        "problems": 1,
        "positions": case.gold.end - case.gold.start,
        "forks": len(case.forks),
        "candidates": len(tallies),
        **{key: case.counts[key] for key in ("rollouts", "rollouts_passing_by", "generated_tokens")},
        "triplets": len(kept),
        "rejected_as_equal": verdicts["equal"],
        "undecided": verdicts["undecided"],
        "beyond_max_triplets": len(negatives) - len(kept),
    }
    line = record_line(
        case.gold.messages,
        [pair["triplet"] for pair in kept],
        id=case.gold.problem.id,
        quality=[[round(pair[of].quality, 4) for of in ("gold", "token")] for pair in kept],
        rollouts=[[pair[of].rollouts for of in ("gold", "token")] for pair in kept],
    )
    histogram = [sum(min(int(q * BINS), BINS - 1) == i for q in qualities) for i in range(BINS)]
    return {"id": case.gold.problem.id, "line": line, "pairs": pairs, "counts": counts, "histogram": histogram}


def most_informative(negatives: list[dict], most: int | None) -> list[dict]:
    """At most so many, in their order: those that cost System 1 most, its probability times the quality lost."""

    def cost(pair: dict) -> float:
        return pair["probability"] * (pair["gold"].quality - pair["token"].quality)

    best = sorted(negatives, key=cost, reverse=True)[:most]
    return [pair for pair in negatives if pair in best]


def write_outputs(
    journal: Journal, output: Path, order: Sequence[str], earlier: frozenset[str], seconds: float, repeated: int
) -> dict:
    """Write triplets, verdicts and report in the problems' order, whoever explored them; drop the journal."""
    total, histogram, now = Counter(), [0] * BINS, 0
    triplets, pairs = (output.with_name(output.name + ending) for ending in (".tmp", ".pairs.jsonl"))
    with triplets.open("w", encoding="utf-8") as lines, pairs.open("w", encoding="utf-8") as verdicts:
        for entry in journal.read(order):
            total.update(entry["counts"])
            histogram = [one + other for one, other in zip(histogram, entry["histogram"], strict=True)]
            now += entry["counts"]["generated_tokens"] * (entry["id"] not in earlier)
            if entry["counts"]["triplets"]:
                lines.write(entry["line"])
            verdicts.write(json.dumps({"id": entry["id"], "pairs": entry["pairs"]}) + "\n")
    if not total["triplets"]:
        raise UserError(f"no triplets in {len(order)} problems: System 1 is never or always right at its forks")
    report = summary(dict(total) | {"repeated_problems": repeated}, histogram, now, seconds)
    output.with_name(output.name + ".report.json").write_text(json.dumps(report, indent=2) + "\n")
    triplets.replace(output)
    journal.discard()
    return report


def _tidy(output: Path, partial: Path) -> dict | None:
    barrier()  # all have seen the folder that now goes
    if not dist_info().is_main:
        return None
    shutil.rmtree(partial)
    return json.loads(output.with_name(output.name + ".report.json").read_text())
