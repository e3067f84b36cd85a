"""How well the sequential test labels, and what it costs, against an exhaustive reference.

The reference rolls out every plausible token of every fork equally often, shares no rollout between tokens, and has
another seed. It is kept beside the results, problem by problem, so that another rule is measured without making it
anew.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

from tqdm import tqdm

from llm2.benchmarks.configs import LabelsBenchmark
from llm2.benchmarks.runner import markdown_table, write_results
from llm2.common.config_file import load_config
from llm2.common.journal import Journal
from llm2.common.loading import load_tokenizer
from llm2.common.stats import wilson_interval
from llm2.config import ExploreConfig
from llm2.exploration.engines import open_engine
from llm2.exploration.explore import Explorer, explore
from llm2.exploration.solutions import load_problems
from llm2.tasks import Problem, load_task

Pair = tuple[str, int, int]  # problem, position, token
CHUNK = 4  # problems of the reference written together


def measure(config: LabelsBenchmark) -> str:
    """Explore sequentially (unless that file is there already), complete the reference, compare."""
    folder = Path(config.output).with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    explored = folder / "triplets.jsonl"
    settings = replace(load_config(ExploreConfig, config.explore), limit=config.problems, output=str(explored))
    if not explored.exists():
        explore(settings)
    report = json.loads((folder / "triplets.jsonl.report.json").read_text())
    verdicts = {
        (line["id"], *pair["triplet"][::2]): pair["verdict"]
        for line in map(json.loads, (folder / "triplets.jsonl.pairs.jsonl").read_text().splitlines())
        for pair in line["pairs"]
    }
    lower, tokens = reference(config, settings, folder / "reference")
    rows = compare(verdicts, lower, settings.quality_margin)
    share = report["generated_tokens"] / (tokens / config.reference_rollouts * config.fixed_rollouts)
    rows.append(row(f"generated tokens, of {config.fixed_rollouts} rollouts a token", share, share, share, "share"))
    write_results(Path(config.output), 1, rows, problems=config.problems, reference_rollouts=config.reference_rollouts)
    return markdown_table(rows)


def reference(config: LabelsBenchmark, settings: ExploreConfig, folder: Path) -> tuple[dict[Pair, float], int]:
    """By how much each token's quality is below gold's, and the tokens generated for that."""
    tokenizer, task = load_tokenizer(settings.model), load_task(settings.task, settings.data_file, settings.grader)
    problems, _ = load_problems(task, settings.split, settings.limit)
    journal = Journal(folder, config, may_differ=("problems", "output", "fixed_rollouts"), key=itemgetter("id"))
    waiting = [problem for problem in problems if problem.id not in journal.done]
    explorer = Explorer(settings, open_engine(settings, tokenizer), tokenizer, task)
    with tqdm(total=len(problems), initial=len(problems) - len(waiting), desc="reference", unit="problem") as bar:
        for index in range(0, len(waiting), CHUNK):
            for entry in exhaust(explorer, waiting[index : index + CHUNK], config):
                journal.add(entry)
                bar.update()
    lower, tokens = {}, 0
    for entry in journal.read([problem.id for problem in problems]):
        tokens += entry["tokens"]
        for position, gold, *others in entry["forks"]:
            lower |= {(entry["id"], position, token): gold[1] - quality for token, quality in others}
    journal.close()
    return lower, tokens


def exhaust(explorer: Explorer, problems: Sequence[Problem], config: LabelsBenchmark) -> Iterator[dict]:
    """One entry a problem: its forks' (token, quality), gold first, and the tokens generated."""
    eos = explorer.engine.eos
    states = explorer.start_problems(problems)
    branches = [(state.solution, *key) for state in states for key in state.test.counts]
    seed, indices = config.reference_seed, range(config.reference_rollouts)
    written = iter(
        explorer.engine.generate(
            [
                solution.rollout_request(position, token, seed, indices)
                for solution, position, token in branches
                if token not in eos
            ]
        )
    )
    quality, tokens = {}, Counter()
    for solution, position, token in branches:
        continuations = [[]] if token in eos else next(written)
        right = solution.grade_rollouts(explorer.task, explorer.tokenizer, position, token, continuations)
        quality[solution.problem.id, position, token] = sum(right) / len(right)
        tokens[solution.problem.id] += sum(map(len, continuations))
    for state in states:
        name = state.solution.problem.id
        forks = [
            [fork.position, *([token, quality[name, fork.position, token]] for token in fork.tokens)]
            for fork in state.test.forks
        ]
        yield {"id": name, "forks": forks, "tokens": tokens[name]}


def compare(verdicts: dict[Pair, str], lower: dict[Pair, float], margin: float) -> list[dict]:
    """Agreement on the pairs whose reference qualities differ by more than the margin, either way."""
    clear = [pair for pair in lower if abs(lower[pair]) > margin]
    decided = [pair for pair in clear if verdicts[pair] != "undecided"]
    agreed = sum((verdicts[pair] == "negative") == (lower[pair] > margin) for pair in decided)
    worse = [pair for pair in clear if lower[pair] > margin]
    found = sum(verdicts[pair] == "negative" for pair in worse)
    negatives = [pair for pair in verdicts if verdicts[pair] == "negative"]
    real = sum(lower[pair] > 0 for pair in negatives)
    return [
        row("label agreement, decided pairs beyond the margin", *of(agreed, len(decided)), "share"),
        row("decided, of the pairs beyond the margin", *of(len(decided), len(clear)), "share"),
        row("found, of the reference's negatives", *of(found, len(worse)), "share"),
        row("worse than gold at all, of the negatives", *of(real, len(negatives)), "share"),
    ]


def of(part: int, whole: int) -> tuple[float, float, float]:
    """A share with its 95 % interval."""
    return part / max(whole, 1), *wilson_interval(part, whole)


def row(name: str, value: float, low: float, high: float, unit: str) -> dict:
    value = {"median": value, "min": low, "max": high}
    return {
        "name": name,
        "batch_size": "",
        "value": value,
        "unit": unit,
        "ratio_to": None,
        "ratio": None,
        "peak_mib": None,
    }
