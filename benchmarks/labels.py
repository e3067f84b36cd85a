"""Agreement of exploration's labels with an exhaustive reference, and their cost.

The reference generates equally many rollouts of every plausible token at every fork, shares none between tokens, and
has another seed. It is kept in a journal, so that another stopping rule can be measured against it. With decided_only
it covers gold and the tokens that exploration decided, which takes a part of the time and says nothing of the others.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

from tqdm import tqdm

from benchmarks.configs import LabelsBenchmark
from benchmarks.runner import markdown_table, result_row, write_results
from llm2.common.config_file import load_config
from llm2.common.inputs import digests, require_same
from llm2.common.journal import Journal
from llm2.common.loading import load_tokenizer, with_batch_dtype
from llm2.common.stats import wilson_interval
from llm2.config import ExploreConfig
from llm2.errors import UserError
from llm2.exploration.engines import open_engine
from llm2.exploration.explore import Explorer, earlier_solutions, explore
from llm2.exploration.solutions import load_problems
from llm2.tasks import Problem, load_task

TokenKey = tuple[str, int, int]  # problem, position, token
TESTBED = ["model=testbed", "task=testbed", "max_new_tokens=200", "batch_size=256", "device=cpu"]
AGREEMENT = "label agreement, decided pairs beyond the margin"
WORSE = "worse than gold at all, of the negatives"
OF_DECIDED = AGREEMENT, WORSE  # the rows that a reference of decided tokens alone can tell
TOGETHER = 4  # problems of the reference that are generated together


def measure(config: LabelsBenchmark) -> str:
    """Explore, unless the output exists, complete the reference, write `config.output`, return the table."""
    folder = Path(config.output).with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    triplets = folder / "triplets.jsonl"
    keys = TESTBED if config.explore is None else []
    files = [f"output={triplets}", f"limit={config.problems}"]
    settings = with_batch_dtype(load_config(ExploreConfig, config.explore, [*keys, *files]))
    if not triplets.exists():
        explore(settings)
    report = json.loads((folder / "triplets.jsonl.report.json").read_text(encoding="utf-8"))
    earlier = report["config"] | {"inputs": report.get("inputs")}
    way_out = f"delete {folder}, or choose another output"
    require_same(earlier, settings, digests(settings), str(triplets), way_out)
    if report["config"]["limit"] != config.problems:
        raise UserError(f"problems: {triplets} has {report['config']['limit']}, found {config.problems}; {way_out}")
    lines = [*map(json.loads, (folder / "triplets.jsonl.pairs.jsonl").read_text(encoding="utf-8").splitlines())]
    verdicts = {(line["id"], *pair["triplet"][::2]): pair["verdict"] for line in lines for pair in line["pairs"]}
    solutions = {line["id"]: line["messages"][-1]["content"] for line in lines}
    decided = {pair for pair in verdicts if verdicts[pair] != "undecided"} if config.decided_only else None
    gaps, tokens = reference(config, settings, solutions, folder / "reference", decided)
    rows = compare(verdicts, gaps, settings.quality_margin)
    if decided is None:
        cost = report["generated_tokens"] / (tokens / config.reference_rollouts * config.fixed_rollouts)
        rows.append(share_row(f"generated tokens, of {config.fixed_rollouts} rollouts per token", cost, cost, cost))
    else:
        rows = [row for row in rows if row["name"] in OF_DECIDED]
    write_results(Path(config.output), 1, rows, problems=config.problems, reference_rollouts=config.reference_rollouts)
    return markdown_table(rows)


def reference(
    config: LabelsBenchmark,
    settings: ExploreConfig,
    solutions: dict[str, str],
    folder: Path,
    wanted: Set[TokenKey] | None = None,
) -> tuple[dict[TokenKey, float], int]:
    """The quality of gold minus that of each other plausible token, or each wanted one, along the explored solutions,
    which are named by the problem's id or, System 1's own ones, by ID/NUMBER; and the number of tokens generated."""
    tokenizer, task = load_tokenizer(settings.model), load_task(settings.task, settings.data_file, settings.grader)
    by_id = {problem.id: problem for problem in load_problems(task, settings.split, settings.limit)[0]}
    problems = [
        replace(by_id.get(name) or by_id[name.rpartition("/")[0]], id=name, solution=text)
        for name, text in solutions.items()
    ]
    journal = Journal(folder, config, digests(settings) | digests(config), key=itemgetter("id"))
    waiting = [problem for problem in problems if problem.id not in journal.done]
    engine = open_engine(settings, tokenizer)
    explorer = Explorer(settings, engine, tokenizer, task, earlier=earlier_solutions(problems))
    with tqdm(total=len(problems), initial=len(problems) - len(waiting), desc="reference", unit="solution") as bar:
        for index in range(0, len(waiting), TOGETHER):
            for entry in reference_entries(explorer, waiting[index : index + TOGETHER], config, wanted):
                journal.add(entry)
                bar.update()
    gaps, tokens = {}, 0
    for entry in journal.read([problem.id for problem in problems]):
        tokens += entry["tokens"]
        for position, (_, gold_quality), *others in entry["forks"]:
            gaps |= {(entry["id"], position, token): gold_quality - quality for token, quality in others}
    journal.close()
    return gaps, tokens


def reference_entries(
    explorer: Explorer, problems: Sequence[Problem], config: LabelsBenchmark, wanted: Set[TokenKey] | None = None
) -> Iterator[dict]:
    """One entry per problem: the (token, quality) pairs of its forks, gold first, and the count of generated tokens."""
    eos, seed, indices = explorer.engine.eos, config.reference_seed, range(config.reference_rollouts)
    states = explorer.start_problems(problems)
    tokens_at = {}  # of each fork, gold first
    for state in states:
        for fork in state.test.forks:
            key = state.solution.problem.id, fork.position
            gold, *others = fork.tokens
            others = [token for token in others if wanted is None or (*key, token) in wanted]
            tokens_at |= {key: [gold, *others]} if others else {}
    solutions = {state.solution.problem.id: state.solution for state in states}
    branches = [
        (solutions[name], position, token) for (name, position), tokens in tokens_at.items() for token in tokens
    ]
    requests = [
        solution.rollout_request(position, token, seed, indices)
        for solution, position, token in branches
        if token not in eos
    ]
    generated = iter(explorer.engine.generate(requests))
    quality, count = {}, Counter()
    for solution, position, token in branches:
        rollouts = [[]] if token in eos else next(generated)
        correct = solution.grade_rollouts(explorer.task, explorer.tokenizer, position, token, rollouts)
        quality[solution.problem.id, position, token] = sum(correct) / len(correct)
        count[solution.problem.id] += sum(map(len, rollouts))
    forks = {name: [] for name in solutions}
    for (name, position), tokens in tokens_at.items():
        forks[name].append([position, *([token, quality[name, position, token]] for token in tokens)])
    for name in solutions:
        yield {"id": name, "forks": forks[name], "tokens": count[name]}


def compare(verdicts: dict[TokenKey, str], gaps: dict[TokenKey, float], margin: float) -> list[dict]:
    """Agreement on the pairs whose reference qualities differ by more than the margin, in either direction. Pairs that
    have no verdict, since exploration skipped their fork, are not decided."""
    clear = [pair for pair in gaps if abs(gaps[pair]) > margin]
    decided = [pair for pair in clear if verdicts.get(pair, "undecided") != "undecided"]
    agreed = sum((verdicts[pair] == "negative") == (gaps[pair] > margin) for pair in decided)
    worse = [pair for pair in clear if gaps[pair] > margin]
    num_found = sum(verdicts.get(pair) == "negative" for pair in worse)
    negatives = [pair for pair in verdicts if verdicts[pair] == "negative"]
    true_negatives = sum(gaps[pair] > 0 for pair in negatives)
    return [
        share_row(name, part / max(whole, 1), *wilson_interval(part, whole))
        for name, part, whole in (
            (AGREEMENT, agreed, len(decided)),
            ("decided, of the pairs beyond the margin", len(decided), len(clear)),
            ("found, of the reference's negatives", num_found, len(worse)),
            (WORSE, true_negatives, len(negatives)),
        )
    ]


def share_row(name: str, share: float, low: float, high: float) -> dict:
    """A row whose minimum and maximum are the bounds of a 95 % interval."""
    return result_row(name, {"median": share, "min": low, "max": high}, "share")
