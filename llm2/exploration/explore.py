"""Token quality exploration: find triplets along right solutions, gold or System 1's own.

At every fork of a solution, a position where System 1 has more than one plausible token, the tokens are rolled out
until the sequential test (quality.py) has a verdict on each. Tokens that are worse than gold become triplets. Many
problems are explored at a time, and processes share them; a journal keeps finished problems.
"""

import json
import math
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from operator import itemgetter
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llm2.common.chat import resolve_template
from llm2.common.config_file import difference
from llm2.common.distributed import barrier, dist_info, iter_shared_work
from llm2.common.inputs import Digests, change, digests
from llm2.common.journal import Journal
from llm2.common.keys import Mark, select_keys
from llm2.common.loading import load_tokenizer, with_batch_dtype
from llm2.common.prefix import common_prefix
from llm2.config import ExploreConfig
from llm2.errors import UserError
from llm2.exploration.engines import Engine, check_engine, open_engine
from llm2.exploration.negatives import NegativeSampler, check_negatives
from llm2.exploration.own_solutions import own_solutions
from llm2.exploration.quality import Fork, SequentialTest, reused_rollouts
from llm2.exploration.solutions import TokenizedSolution, check_template, find_forks, load_problems, tokenize_solutions
from llm2.exploration.summary import BINS, write_outputs
from llm2.tasks import Problem, Task, load_task
from llm2.verifier.triplets import Triplet, record_line

START_SIZE = 16  # problems that are started together


@dataclass
class ProblemState:
    """A solution being explored."""

    solution: TokenizedSolution
    test: SequentialTest
    pending: dict[tuple[int, int], range] = field(
        default_factory=dict
    )  # rollouts not graded yet, as in `next_rollouts`
    counts: Counter = field(default_factory=Counter)  # rollouts, rollouts_passing_by, generated_tokens


def explore(config: ExploreConfig) -> dict | None:
    """Write `config.output` and its side files; resumes an interrupted run.

    Returns the report in the main process; None in the others, once their share is done.
    """
    barrier()  # the main process has locked the output against other runs
    config = with_batch_dtype(config)
    output, partial, inputs = Path(config.output), Path(f"{config.output}.partial"), digests(config)
    report = finished_report(config, inputs) if output.exists() and partial.exists() else None
    if report is not None:  # killed after the last output file, before the journal was discarded
        barrier()  # all processes have seen the folder
        if not dist_info().is_main:
            return None
        shutil.rmtree(partial)
        return report
    task, problems, repeated = prepare(config)
    tokenizer = load_tokenizer(config.model)
    check_template(config, tokenizer, task, problems[0])
    engine = open_engine(config, tokenizer)
    output.parent.mkdir(parents=True, exist_ok=True)
    shard = dist_info().rank
    journal = Journal(partial, config, inputs, key=itemgetter("id"), shard=shard)
    earlier = frozenset(journal.done)
    barrier()  # all processes read the same journal before one adds to it
    sampling = {}
    if config.solutions == "own":
        problems, sampling = own_solutions(config, engine, tokenizer, task, problems, partial / "solutions", inputs)
    waiting = [problem for problem in problems if problem.id not in earlier]

    start = time.perf_counter()
    share = math.ceil(len(waiting) / dist_info().world_size)  # an estimate: see `iter_shared_work`
    progress = Progress(share, disable=not dist_info().is_main)
    explorer = Explorer(config, engine, tokenizer, task, progress, earlier_solutions(problems))
    with progress.bar as bar:
        for state in explorer.explore(waiting[i] for i in iter_shared_work(len(waiting))):
            journal.add(journal_entry(state, config.max_triplets))
        bar.n = bar.total = round(bar.n)
    engine.close()
    task.close()
    journal.close()
    barrier()  # every problem is in a shard
    if not dist_info().is_main:
        return None
    seconds = time.perf_counter() - start
    order = [problem.id for problem in problems]
    sources = {"repeated_problems": repeated, **sampling}
    return write_outputs(config, inputs, journal, order, earlier, seconds, sources)


def finished_report(config: ExploreConfig, inputs: Digests) -> dict | None:
    """The report beside the output; None if another run wrote it."""
    report = json.loads(Path(f"{config.output}.report.json").read_text(encoding="utf-8"))
    other = difference(report["config"], config, select_keys(config, Mark.HOW)) or change(report.get("inputs"), inputs)
    return None if other else report


def prepare(config: ExploreConfig) -> tuple[Task, list[Problem], int]:
    """The task, its problems, and the number of duplicates dropped. Raises UserError before models are loaded."""
    check_engine(config)
    check_negatives(config)
    if config.min_rollouts > config.max_rollouts:
        raise UserError(
            f"min_rollouts: found {config.min_rollouts}, expected at most max_rollouts={config.max_rollouts}"
        )
    if Path(config.output).exists() and not Path(f"{config.output}.partial").exists():
        raise UserError(f"{config.output} exists already; choose another output, or delete it to explore anew")
    task = load_task(config.task, config.data_file, config.grader)
    return task, *load_problems(task, config.split, config.limit, need_gold=config.solutions == "gold")


class Progress:
    """A progress bar, drawn at most once a second, with an ETA from the average speed.

    A problem counts by the share of its tokens with a verdict, since problems finish in bursts.
    """

    def __init__(self, problems: int, **options) -> None:
        options |= {"desc": "explore", "unit": "problem", "mininterval": 1, "miniters": 0, "smoothing": 0}
        self.bar = tqdm(total=problems, **options)
        self.problems, self.rollouts, self.tokens, self.running = 0.0, 0, 0, 0
        self.start = time.perf_counter()

    def on_token(self, *_: int) -> None:
        """Count a token of an unfinished rollout."""
        self.running += 1
        self.add(0.0)

    def add(self, problems: float, continuations: Sequence[Sequence[int]] = ()) -> None:
        self.problems += problems
        self.rollouts += len(continuations)
        self.tokens += sum(map(len, continuations))
        self.bar.n = round(self.problems, 1)
        speed = max(self.tokens, self.running) / (time.perf_counter() - self.start)
        self.bar.set_postfix_str(f"{self.rollouts:,} rollouts, {speed:,.0f} tokens/s", refresh=False)
        self.bar.update(0)


@dataclass
class Explorer:
    """Tests System 1's plausible tokens along right solutions, with an engine's rollouts."""

    config: ExploreConfig
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    task: Task
    progress: Progress = field(default_factory=lambda: Progress(0, disable=True))
    earlier: dict[str, Sequence[Problem]] = field(default_factory=dict)  # of `earlier_solutions`

    def __post_init__(self) -> None:
        explored = self.config.negatives == "explored"
        self.negative_sampler = None if explored else NegativeSampler(self.config, self.tokenizer)

    def explore(self, problems: Iterable[Problem]) -> Iterator[ProblemState]:
        """Yield each problem when all its verdicts are made.

        A problem's next rollouts are queued as soon as its previous ones are graded; new problems are started while the
        engine has fewer than `window` batches of rollouts.
        """
        waiting, requests, running, numbers = iter(problems), deque(), {}, count()
        finished = self.engine.stream(requests, self.progress.on_token)

        def begin(states: Iterable[ProblemState]) -> Iterator[ProblemState]:
            """Queue the pending rollouts of these problems; yields problems without any."""
            for state in states:
                for key, indices in state.pending.items():
                    request = state.solution.rollout_request(*key, self.config.seed, self._distinct(indices))
                    running[next(numbers)] = (state, key, len(request.seeds))
                    requests.append(request)
                if not state.pending:
                    yield state

        enough = self.engine.window * self.config.batch_size
        while True:
            while sum(rows for *_, rows in running.values()) < enough and (new := list(islice(waiting, START_SIZE))):
                yield from begin(self.start_problems(new))
            if not running:
                return
            number, continuations = next(finished)
            state, key, _ = running.pop(number)
            if self.finish(state, key, continuations):
                yield from begin([state])

    def start_problems(self, problems: Sequence[Problem]) -> list[ProblemState]:
        template = resolve_template(self.config.chat_template)
        solutions = tokenize_solutions(self.task, problems, self.tokenizer, template, self.engine.eos)
        states = []
        for solution, forks in zip(solutions, find_forks(self.engine, solutions), strict=True):
            shared = self._shared_with_earlier(solution)
            forks = [fork for fork in forks if fork.position >= shared]
            if self.negative_sampler is not None:
                states.append(self._without_rollouts(solution, forks))
                continue
            state = ProblemState(solution, SequentialTest(forks, self.config))
            for position, token in state.test.counts:
                if token in self.engine.eos:  # ends the answer: no rollout needed
                    enough = max(self.config.gold_rollouts, self.config.max_rollouts)
                    self.record_outcomes(state, position, token, [[]], weight=enough)
            state.pending = state.test.next_rollouts()
            self.progress.add(state.test.progress)
            states.append(state)
        return states

    def _shared_with_earlier(self, solution: TokenizedSolution) -> int:
        """Length of the prefix shared with an earlier solution of the problem, whose forks are explored already."""
        earlier = self.earlier.get(solution.problem.id, ())
        template = resolve_template(self.config.chat_template)
        others = tokenize_solutions(self.task, earlier, self.tokenizer, template, self.engine.eos)
        return max((common_prefix(solution.ids, other.ids) for other in others), default=0)

    def _without_rollouts(self, solution: TokenizedSolution, forks: Sequence[Fork]) -> ProblemState:
        """A finished problem in which every token that the sampler chose is a negative."""
        test = SequentialTest(self.negative_sampler(solution, forks), self.config)
        test.verdicts = {(fork.position, token): "negative" for fork in test.forks for token in fork.tokens[1:]}
        self.progress.add(1.0)
        return ProblemState(solution, test)

    def _distinct(self, indices: range) -> range:
        """The rollouts to generate: greedy ones are equal, so only the first."""
        return indices[:1] if self.config.temperature == 0 else indices

    def finish(self, state: ProblemState, key: tuple[int, int], continuations: Sequence[Sequence[int]]) -> bool:
        """Count a token's finished rollouts; True if its problem has no others running; the next are then pending."""
        before, indices = state.test.progress, state.pending.pop(key)
        self.record_outcomes(state, *key, continuations, weight=len(indices) // len(self._distinct(indices)))
        state.counts["rollouts"] += len(continuations)
        state.counts["generated_tokens"] += sum(map(len, continuations))
        if last := not state.pending:
            state.pending = state.test.next_rollouts()
        self.progress.add(state.test.progress - before, continuations)
        return last

    def record_outcomes(
        self, state: ProblemState, position: int, token: int, continuations: Sequence[Sequence[int]], weight: int
    ) -> None:
        """Grade rollouts of a token, each counted `weight` times; gold's also count for later forks that they pass."""
        solution = state.solution
        outcomes = solution.grade_rollouts(self.task, self.tokenizer, position, token, continuations)
        for right, continuation in zip(outcomes, continuations, strict=True):
            state.test.add(position, token, right, weight)
            if token == solution.ids[position]:
                for reused in reused_rollouts(solution.ids, position, continuation, state.test.forks):
                    state.test.add(*reused, right, weight)
                    state.counts["rollouts_passing_by"] += 1


def earlier_solutions(problems: Sequence[Problem]) -> dict[str, Sequence[Problem]]:
    """Each problem's id -> earlier problems with the same prompt and other solutions."""
    same: dict[str, list[Problem]] = {}
    earlier = {}
    for problem in problems:
        before = same.setdefault(json.dumps([*problem.history, problem.question]), [])
        earlier[problem.id] = tuple(before)
        before.append(problem)
    return earlier


def journal_entry(state: ProblemState, max_triplets: int | None) -> dict:
    """A journal entry: the problem's line of triplets, every verdict with its rollouts, and counts for the report."""
    solution, rollout_counts = state.solution, state.test.counts
    pairs = [
        {
            "triplet": Triplet(fork.position, fork.tokens[0], token),
            "verdict": state.test.verdicts[fork.position, token],
            "gold": rollout_counts[fork.position, fork.tokens[0]],  # right, rollouts
            "token": rollout_counts[fork.position, token],
            "probability": round(probability, 4),
        }
        for fork in state.test.forks
        for token, probability in zip(fork.tokens[1:], fork.probabilities[1:], strict=True)
    ]
    negatives = [pair for pair in pairs if pair["verdict"] == "negative"]
    kept = most_informative(negatives, max_triplets)
    verdicts = Counter(pair["verdict"] for pair in pairs)
    qualities = [counts.quality for counts in rollout_counts.values() if counts.rollouts]
    counts = {
        "problems": 1,
        "positions": solution.end - solution.start,
        "forks": len(state.test.forks),
        "skipped_forks": state.test.skipped_forks or 0,
        "candidates": len(rollout_counts),
        **{key: state.counts[key] for key in ("rollouts", "rollouts_passing_by", "generated_tokens")},
        "triplets": len(kept),
        "rejected_as_equal": verdicts["equal"],
        "undecided": verdicts["undecided"],
        "beyond_max_triplets": len(negatives) - len(kept),
    }
    evidence = {}
    if qualities:
        evidence["quality"] = [[round(pair[key].quality, 4) for key in ("gold", "token")] for pair in kept]
        evidence["rollouts"] = [[pair[key].rollouts for key in ("gold", "token")] for pair in kept]
    line = record_line(solution.messages, [pair["triplet"] for pair in kept], id=solution.problem.id, **evidence)
    histogram = [sum(min(int(q * BINS), BINS - 1) == i for q in qualities) for i in range(BINS)]
    return {"id": solution.problem.id, "line": line, "pairs": pairs, "counts": counts, "histogram": histogram}


def most_informative(negatives: list[dict], max_triplets: int | None) -> list[dict]:
    """The negatives with the highest expected cost (System 1's probability times lost quality), in their order."""

    def cost(pair: dict) -> float:
        lost = pair["gold"].quality - pair["token"].quality if pair["token"].rollouts else 1.0
        return pair["probability"] * lost

    kept = sorted(negatives, key=cost, reverse=True)[:max_triplets]
    return [pair for pair in negatives if pair in kept]
