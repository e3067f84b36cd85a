"""Agreement of exploration's labels with an exhaustive reference, and their cost.

The reference generates equally many rollouts of every plausible token at every fork, shares none between tokens, and
has another seed. It is kept in a journal, so that another stopping rule can be measured against it.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

from tqdm import tqdm

from llm2.benchmarks.configs import LabelsBenchmark
from llm2.benchmarks.runner import markdown_table, result_row, write_results
from llm2.common.config_file import load_config
from llm2.common.journal import Journal
from llm2.common.loading import load_tokenizer
from llm2.common.seeds import row_seed
from llm2.common.stats import wilson_interval
from llm2.config import ExploreConfig
from llm2.exploration.engines import Request, open_engine
from llm2.exploration.explore import Explorer, explore
from llm2.exploration.solutions import load_solved
from llm2.tasks import Problem, load_task

TokenKey = tuple[str, int, int]  # problem, position, token
CHUNK = 4  # problems of the reference that are generated together


def measure(config: LabelsBenchmark) -> str:
    """Explore (unless that was done), complete the reference, write `config.output`, return the table."""
    folder = Path(config.output).with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    triplets = folder / "triplets.jsonl"
    settings = replace(load_config(ExploreConfig, config.explore), limit=config.problems, output=str(triplets))
    if not triplets.exists():
        explore(settings)
    report = json.loads((folder / "triplets.jsonl.report.json").read_text())
    verdicts = {
        (line["id"], *pair["triplet"][::2]): pair["verdict"]
        for line in map(json.loads, (folder / "triplets.jsonl.pairs.jsonl").read_text().splitlines())
        for pair in line["pairs"]
    }
    gaps, tokens = reference(config, settings, folder / "reference")
    cost = report["generated_tokens"] / (tokens / config.reference_rollouts * config.fixed_rollouts)
    rows = [
        *compare(verdicts, gaps, settings.quality_margin),
        share_row(f"generated tokens, of {config.fixed_rollouts} rollouts per token", cost, cost, cost),
    ]
    write_results(Path(config.output), 1, rows, problems=config.problems, reference_rollouts=config.reference_rollouts)
    return markdown_table(rows)


def reference(config: LabelsBenchmark, settings: ExploreConfig, folder: Path) -> tuple[dict[TokenKey, float], int]:
    """The quality of gold minus that of each other plausible token, and the number of tokens generated."""
    tokenizer, task = load_tokenizer(settings.model), load_task(settings.task, settings.data_file, settings.grader)
    problems, _ = load_solved(settings, task)
    journal = Journal(folder, config, may_differ=("problems", "output", "fixed_rollouts"), key=itemgetter("id"))
    waiting = [problem for problem in problems if problem.id not in journal.done]
    explorer = Explorer(settings, open_engine(settings, tokenizer), tokenizer, task)
    with tqdm(total=len(problems), initial=len(problems) - len(waiting), desc="reference", unit="problem") as bar:
        for index in range(0, len(waiting), CHUNK):
            for entry in reference_entries(explorer, waiting[index : index + CHUNK], config):
                journal.add(entry)
                bar.update()
    gaps, tokens = {}, 0
    for entry in journal.read([problem.id for problem in problems]):
        tokens += entry["tokens"]
        for position, (_, gold_quality), *others in entry["forks"]:
            gaps |= {(entry["id"], position, token): gold_quality - quality for token, quality in others}
    journal.close()
    return gaps, tokens


def reference_entries(explorer: Explorer, problems: Sequence[Problem], config: LabelsBenchmark) -> Iterator[dict]:
    """One entry per problem: the (token, quality) pairs of its forks, gold first, and the count of generated tokens."""
    n, eos = config.reference_rollouts, explorer.engine.eos
    cases = explorer.begin(problems)
    branches = [(case, fork, token) for case in cases for fork in case.forks for token in fork.tokens]
    requests = [
        Request(
            case.gold.ids,
            fork.position,
            (token,),
            [row_seed(config.reference_seed, case.gold.problem.id, fork.position, token, i) for i in range(n)],
        )
        for case, fork, token in branches
        if token not in eos
    ]
    generated = iter(explorer.engine.generate(requests))
    quality = {}
    for case, fork, token in branches:
        rollouts = [[]] if token in eos else next(generated)
        prefix = [*case.gold.ids[case.gold.start : fork.position], token]
        texts = explorer.tokenizer.batch_decode([[*prefix, *rollout] for rollout in rollouts], skip_special_tokens=True)
        correct = [grade.correct for grade in explorer.task.grade(texts, case.gold.problem.gold)]
        quality[case.gold.problem.id, fork.position, token] = sum(correct) / len(correct)
        case.counts["tokens"] += sum(map(len, rollouts))
    for case in cases:
        name = case.gold.problem.id
        forks = [
            [fork.position, *([token, quality[name, fork.position, token]] for token in fork.tokens)]
            for fork in case.forks
        ]
        yield {"id": name, "forks": forks, "tokens": case.counts["tokens"]}


def compare(verdicts: dict[TokenKey, str], gaps: dict[TokenKey, float], margin: float) -> list[dict]:
    """Agreement on the pairs whose reference qualities differ by more than the margin, in either direction."""
    clear = [pair for pair in gaps if abs(gaps[pair]) > margin]
    decided = [pair for pair in clear if verdicts[pair] != "undecided"]
    agreed = sum((verdicts[pair] == "negative") == (gaps[pair] > margin) for pair in decided)
    worse = [pair for pair in clear if gaps[pair] > margin]
    found = sum(verdicts[pair] == "negative" for pair in worse)
    negatives = [pair for pair in verdicts if verdicts[pair] == "negative"]
    true_negatives = sum(gaps[pair] > 0 for pair in negatives)
    return [
        share_row(name, part / max(whole, 1), *wilson_interval(part, whole))
        for name, part, whole in (
            ("label agreement, decided pairs beyond the margin", agreed, len(decided)),
            ("decided, of the pairs beyond the margin", len(decided), len(clear)),
            ("found, of the reference's negatives", found, len(worse)),
            ("worse than gold at all, of the negatives", true_negatives, len(negatives)),
        )
    ]


def share_row(name: str, share: float, low: float, high: float) -> dict:
    """A row whose minimum and maximum are the bounds of a 95 % interval."""
    return result_row(name, {"median": share, "min": low, "max": high}, "share")
