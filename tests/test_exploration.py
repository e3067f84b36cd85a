"""Exploration: forks, verdicts with their evidence, progress, interrupted and parallel runs, bad input."""

import json
import os
import re
import signal
from collections import deque
from dataclasses import replace
from io import StringIO
from operator import itemgetter
from pathlib import Path
from random import Random
from string import ascii_lowercase

import pytest
import torch
from conftest import tiny_verifier
from ranks import run_ranks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm2.common.chat import CHATML_PLAIN, LLAMA3_PLAIN
from llm2.common.config_file import as_dict
from llm2.common.journal import Journal
from llm2.common.loading import eos_ids, load_system1, load_tokenizer
from llm2.config import ExploreConfig
from llm2.decoding.decoder import Decoder
from llm2.decoding.llm2 import LLM2
from llm2.decoding.sampling import SamplingParams
from llm2.errors import UserError
from llm2.exploration.engines import PositionQuery, Request, open_engine
from llm2.exploration.engines.local import LocalEngine
from llm2.exploration.explore import Explorer, Progress, explore, most_informative
from llm2.exploration.negatives import NegativeSampler
from llm2.exploration.own_solutions import Sample, own_solutions
from llm2.exploration.quality import RolloutCounts
from llm2.exploration.solutions import find_forks, tokenize_solutions
from llm2.tasks import load_task
from llm2.tasks.grading import Grade
from llm2.verifier.triplets import load_examples

SYSTEM1 = "llm2/testbed/system1"


@pytest.fixture(scope="module")
def loaded():
    return load_system1(SYSTEM1, torch.device("cpu")), load_tokenizer(SYSTEM1)


@pytest.fixture
def config(tmp_path) -> ExploreConfig:
    return ExploreConfig(
        model=SYSTEM1,
        output=str(tmp_path / "triplets.jsonl"),
        task="testbed",
        limit=6,
        max_new_tokens=160,
        batch_size=64,
        device="cpu",
    )


def test_forks_are_where_more_than_one_token_is_plausible(loaded, config):
    """Against the definition, position by position, from one forward a prefix."""
    model, tokenizer = loaded
    task = load_task("testbed")
    (solution,) = tokenize_solutions(
        task, task.problems("train", 1), tokenizer, LLAMA3_PLAIN, eos_ids(model, tokenizer)
    )
    (forks,) = find_forks(open_engine(config, tokenizer), [solution])
    forks = {fork.position: fork for fork in forks}
    assert tokenizer.decode(solution.ids[solution.start : solution.end - 1]) == solution.problem.solution
    assert solution.ids[solution.end - 1] == tokenizer.eos_token_id
    for position in range(solution.start, solution.end):
        with torch.inference_mode():
            p = model(torch.tensor([solution.ids[:position]])).logits[0, -1].softmax(-1)
        plausible = set((p >= 0.1 * p.max()).nonzero().flatten().tolist())
        if len(plausible) > 1:
            fork = forks[position]
            gold = solution.ids[position]
            assert set(fork.tokens) == plausible | {gold} and fork.tokens[0] == gold
            for token, probability in zip(fork.tokens, fork.probabilities, strict=True):
                assert probability == pytest.approx(p[token].item() if token in plausible else 0, abs=1e-5)
        else:
            assert position not in forks


@pytest.mark.parametrize("limit", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_explored_triplets_fit_the_format_and_prefer_gold(config, loaded, limit):
    report = explore(replace(config, limit=limit))
    examples, summary = load_examples(config.output, loaded[1], LLAMA3_PLAIN)
    assert report["config"] == as_dict(replace(config, limit=limit))
    assert summary.triplets == report["triplets"] > 0 and summary.duplicates == 0
    soft, _ = load_examples(config.output + ".pairs.jsonl", loaded[1], LLAMA3_PLAIN)
    assert sum(len(example.triplets) for example in soft) > summary.triplets
    negatives = {}
    verdicts = []
    for line in Path(config.output + ".pairs.jsonl").read_text().splitlines():
        record = json.loads(line)
        for pair in record["pairs"]:
            verdicts.append(pair["verdict"])
            if pair["verdict"] == "negative":
                negatives.setdefault(record["id"], []).append(pair)
    assert len(verdicts) == report["candidates"] - report["forks"]
    assert verdicts.count("equal") == report["rejected_as_equal"] > 0
    assert verdicts.count("undecided") == report["undecided"] > 0
    assert report["problems"] == limit and sum(report["quality_histogram"]) <= report["candidates"]
    assert report["rollouts"] < 0.3 * 16 * report["candidates"]  # the benchmark measures it on more problems
    assert report["rollouts_passing_by"] > 0.3 * report["rollouts"]
    for line in Path(config.output).read_text().splitlines():
        record = json.loads(line)
        pairs = negatives.pop(record["id"])
        assert record["samples"] == [pair["triplet"] for pair in pairs]
        for (gold, negative), (gold_n, negative_n), pair in zip(
            record["quality"], record["rollouts"], pairs, strict=True
        ):
            assert gold > negative and gold_n >= config.gold_rollouts and negative_n >= config.min_rollouts
            assert pair["gold"] == [round(gold * gold_n), gold_n]
            assert pair["token"] == [round(negative * negative_n), negative_n]
    assert not negatives


@pytest.mark.parametrize("problems", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_every_counted_rollout_began_at_its_token_or_was_reused(config, loaded, problems):
    tokenizer = loaded[1]
    explorer = Explorer(config, open_engine(config, tokenizer), tokenizer, load_task("testbed"))
    states = list(explorer.explore(load_task("testbed").problems("train", problems)))
    enough = max(config.gold_rollouts, config.max_rollouts)  # counted for each token that ends the answer
    ends = sum(token in explorer.engine.eos for state in states for _, token in state.test.counts)
    counted = sum(counts.rollouts for state in states for counts in state.test.counts.values())
    written = sum(state.counts["rollouts"] + state.counts["rollouts_passing_by"] for state in states)
    assert counted - enough * ends == written > 0


def test_greedy_rollouts_are_generated_once_per_token(config):
    report = explore(replace(config, temperature=0.0, limit=3))
    assert 0 < report["rollouts"] <= 2 * report["candidates"]
    assert report["undecided"] == 0


def test_hopeless_forks_are_skipped_and_counted(config, tmp_path):
    whole = explore(replace(config, output=str(tmp_path / "whole.jsonl")))
    report = explore(replace(config, skip_hopeless=True))
    assert whole["skipped_forks"] == 0 < report["skipped_forks"] == whole["forks"] - report["forks"]
    assert report["generated_tokens"] < whole["generated_tokens"]
    lines = Path(config.output + ".pairs.jsonl").read_text().splitlines()
    assert sum(len(json.loads(line)["pairs"]) for line in lines) == report["candidates"] - report["forks"]


GUIDED = pytest.param({"verifier": "verifier", "beta": 3.0, "limit": 6}, marks=pytest.mark.slow)


@pytest.mark.long
@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"skip_hopeless": True}, GUIDED])
def test_rollouts_that_join_others_in_flight_give_the_files_of_rounds(quick, tmp_path, monkeypatch, changes):
    config, counts, real = replace(quick, **{"limit": 3, "max_new_tokens": 8, **changes}), [], LocalEngine.stream
    if config.verifier is not None:
        config = replace(config, verifier=str(tmp_path / config.verifier))
        tiny_verifier(tmp_path / "base", vocab_size=len(load_tokenizer(quick.model))).save_pretrained(config.verifier)

    def counted(engine, *arguments):
        counts.append(engine.decoder.counts)  # closed engines have no decoder
        yield from real(engine, *arguments)

    def by_rounds(engine, requests, on_token):
        counts.append(engine.decoder.counts)  # closed engines have no decoder
        start = 0
        while requests:
            taken = deque(requests)
            requests.clear()
            size = len(taken)
            yield from [(start + index, found) for index, found in real(engine, taken)]
            start += size

    for name, stream in (("joined", counted), ("rounds", by_rounds)):
        monkeypatch.setattr(LocalEngine, "stream", stream)
        explore(replace(config, output=str(tmp_path / name)))
    for ending in ("", ".pairs.jsonl"):
        assert (tmp_path / f"joined{ending}").read_bytes() == (tmp_path / f"rounds{ending}").read_bytes()
    joined, rounds = (count["system1_forwards"] for count in counts)
    assert joined < rounds or config.verifier is not None, "guided rows wait for the verifier in a forward of its own"


# --- Own solutions ---


def is_even(text: str, gold: str) -> bool:
    """A grader that about half of a random model's solutions pass."""
    return len(text) % 2 == 0


def own(quick: ExploreConfig, **changes) -> ExploreConfig:
    changes = {"solution_samples": 6, "max_solutions": 2, "max_rollouts": 2, "confidence": 0.6, **changes}
    return replace(quick, solutions="own", grader="test_exploration:is_even", **changes)


def test_own_solutions_are_right_and_distinct_and_seeded_by_their_problem(quick):
    config, tokenizer = own(quick), load_tokenizer(quick.model)
    task = load_task("chats", quick.data_file, config.grader)
    problems, engine = task.problems("train"), open_engine(config, tokenizer)
    found, counts = own_solutions(config, engine, tokenizer, task, problems, Path(quick.output + ".a"), {})
    by_question = {}
    for problem in found:
        by_question.setdefault(problem.question, []).append(problem)
    assert counts["solutions"] == len(found) > counts["solved_problems"] == len(by_question) > 5
    for same in by_question.values():
        assert [problem.id for problem in same] == [f"{same[0].question[:-1]}/{i}" for i in range(len(same))]
        assert len({problem.solution for problem in same}) == len(same) <= 2
    assert all(is_even(problem.solution, "") for problem in found)
    some = next(problem for problem in problems if problem.question in by_question)
    alone, _ = own_solutions(config, engine, tokenizer, task, [some], Path(quick.output + ".b"), {})
    assert alone == by_question[some.question]


@pytest.mark.long
def test_exploration_along_own_solutions_needs_no_gold_and_resumes_to_the_byte(quick, monkeypatch):
    monkeypatch.setattr("llm2.exploration.explore.START_SIZE", 2)
    config = own(quick)
    report = explore(config)
    assert report["triplets"] > 0 and report["sampled_problems"] == 20
    assert report["solutions"] == report["problems"] > report["solved_problems"]
    killed = replace(config, output=config.output + ".killed")
    assert -signal.SIGKILL in run(killed, 2, 3) and run(killed, 2) == [0, 0]
    for ending in ("", ".pairs.jsonl"):
        assert Path(killed.output + ending).read_bytes() == Path(config.output + ending).read_bytes()


def test_an_own_solution_loses_the_spaces_at_its_beginning(quick, monkeypatch):
    """The tokenizer may join them to the end of the prompt, which would end the exploration."""
    texts = ["  8 of them", "\n8 of them", "8 of them", "9 of them"]

    def sampled(config, engine, tokenizer, task, problems, bar):
        yield from ((problem, [Sample(text, Grade("8", True, True), 3) for text in texts]) for problem in problems)

    monkeypatch.setattr("llm2.exploration.own_solutions.sample_solutions", sampled)
    config, task = own(quick), load_task("chats", quick.data_file, None)
    problems = task.problems("train")
    found, counts = own_solutions(config, None, None, task, problems, Path(quick.output + ".own"), {})
    assert [problem.solution for problem in found] == ["8 of them", "9 of them"] * len(problems)
    assert counts["solutions"] == 2 * len(problems)


def test_each_sampled_problem_is_kept_once_it_is_finished(quick, monkeypatch):
    config, tokenizer = own(quick), load_tokenizer(quick.model)
    task, folder = load_task("chats", quick.data_file, config.grader), Path(quick.output + ".own")
    problems, engine, added = task.problems("train"), open_engine(config, tokenizer), []
    add = Journal.add

    def third_time_unlucky(self, entry):
        add(self, entry)
        added.append(entry["id"])
        if len(added) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", third_time_unlucky)
    with pytest.raises(KeyboardInterrupt):
        own_solutions(config, engine, tokenizer, task, problems, folder, {})
    found, _ = own_solutions(config, engine, tokenizer, task, problems, folder, {})
    assert len(added) == len(set(added)) == len(problems) == 20
    assert found == own_solutions(config, engine, tokenizer, task, problems, Path(quick.output + ".whole"), {})[0]


@pytest.mark.long
def test_a_fork_that_two_own_solutions_share_is_explored_once(quick):
    config = own(quick, max_solutions=6, solution_samples=20, limit=8)
    explore(config)
    seen, tokenizer = [], load_tokenizer(config.model)
    for line in Path(config.output + ".pairs.jsonl").read_text().splitlines():
        record = json.loads(line)
        ids = tokenizer.apply_chat_template(record["messages"], return_dict=False)
        seen += [(*ids[:position], gold, token) for position, gold, token in (p["triplet"] for p in record["pairs"])]
    assert len(set(seen)) == len(seen) > 50


def test_without_a_right_sample_the_task_is_named_hopeless(quick):
    config = replace(own(quick), grader="test_exploration:never")
    with pytest.raises(UserError, match="none of 6 samples is right on any of 20 problems"):
        explore(config)


def never(text: str, gold: str) -> bool:
    return False


@pytest.mark.long
def test_answers_without_solutions_are_explored_along_own_ones_only(config):
    with pytest.raises(UserError, match="problem train-0 has no gold solution; expected one, or solutions=own"):
        explore(replace(config, task="experiments.testbed.regimes:Answers"))
    report = explore(replace(config, task="experiments.testbed.regimes:Answers", solutions="own", limit=4))
    assert report["triplets"] > 0


# --- Guided exploration ---


def test_a_verifier_guides_rollouts_and_leaves_the_plausible_tokens_alone(quick, tmp_path):
    tiny_verifier(tmp_path / "base", vocab_size=len(load_tokenizer(quick.model))).save_pretrained(tmp_path / "verifier")
    guided = replace(quick, verifier=str(tmp_path / "verifier"), beta=3.0, alpha=0.01)
    tokenizer = load_tokenizer(quick.model)
    engines = [open_engine(config, tokenizer) for config in (replace(guided, verifier=None), guided)]
    requests = [Request([5, 6, 7], 3, (token,), [1, 2, 3]) for token in (8, 9)]
    plain, found = (engine.generate(requests) for engine in engines)
    llm2 = LLM2.from_pretrained(quick.model, guided.verifier, device="cpu", **guided.guidance_kwargs())
    expected = Decoder(llm2.system1, llm2.guidance).decode(
        [request.prompt for request in requests],
        max_new_tokens=guided.max_new_tokens,
        eos=llm2.eos,
        sampling=SamplingParams(),
        seeds=[request.seeds for request in requests],
    )
    assert found == [[row.token_ids for row in rows] for rows in expected] != plain
    query = [PositionQuery([5, 6, 7, 8, 9], 1, 5)]
    assert engines[0].plausible(query) == engines[1].plausible(query)


# --- Negatives without rollouts ---


def cheap(config: ExploreConfig, negatives: str, **changes) -> list[dict]:
    """The records of an exploration without rollouts."""
    config = replace(config, negatives=negatives, output=f"{config.output}.{negatives}", **changes)
    report = explore(config)
    assert report["rollouts"] == report["generated_tokens"] == 0
    records = [json.loads(line) for line in Path(config.output).read_text().splitlines()]
    assert sum(len(record["samples"]) for record in records) == report["triplets"]
    assert all("quality" not in record for record in records)
    load_examples(config.output, load_tokenizer(config.model), LLAMA3_PLAIN)  # every position fits
    return records


def test_cheap_negatives_come_from_where_their_kind_says(config):
    config = replace(config, limit=3)
    every = {tuple(sample) for record in cheap(config, "plausible") for sample in record["samples"]}
    assert len(every) > 10
    sampled = {
        tuple(sample) for record in cheap(config, "sampled", negatives_per_fork=1) for sample in record["samples"]
    }
    assert {sample[:2] for sample in sampled} == {sample[:2] for sample in every} and sampled < every
    uniform = {tuple(sample) for record in cheap(config, "random") for sample in record["samples"]}
    assert len(uniform & every) < 0.1 * len(uniform) and all(gold != negative for _, gold, negative in uniform)


def test_a_contrast_of_weight_0_is_system1_and_a_large_one_avoids_what_the_better_model_likes(loaded):
    """By hand: weights of p1^(1+w) / p2^w, with p2 from one forward of the second model."""
    model, tokenizer = loaded
    task = load_task("testbed")
    (solution,) = tokenize_solutions(task, task.problems("train", 1), tokenizer, LLAMA3_PLAIN, [2])
    config = ExploreConfig(
        model=SYSTEM1, output="o", task="testbed", device="cpu", negatives="contrast", contrast_model=SYSTEM1
    )
    forks = find_forks(open_engine(config, tokenizer), [solution])[0]
    for w in (0.0, 2.0):
        sampler = NegativeSampler(replace(config, contrast_weight=w), tokenizer)
        with torch.no_grad():
            sampler.contrast_model.lm_head.weight.mul_(0.5)  # another model, with flatter probabilities
        weights = sampler._contrast_weights(solution, forks)
        for fork, found in zip(forks, weights, strict=True):
            with torch.inference_mode():
                logits = sampler.contrast_model(torch.tensor([solution.ids[: fork.position]])).logits[0, -1]
            others = logits.softmax(-1)[list(fork.tokens[1:])].tolist()
            expected = [p ** (1 + w) / q**w for p, q in zip(fork.probabilities[1:], others, strict=True)]
            assert [x / sum(found) for x in found] == pytest.approx([x / sum(expected) for x in expected], rel=1e-3)


def test_a_contrast_needs_its_model_and_no_other_kind_takes_one(config):
    for changes in ({"negatives": "contrast"}, {"contrast_model": SYSTEM1}):
        with pytest.raises(UserError, match="expected a model with negatives=contrast and none without"):
            explore(replace(config, **changes))


def test_max_triplets_keeps_those_that_cost_most():
    def pair(probability, gold, token):
        return {"probability": probability, "gold": RolloutCounts(gold, 8), "token": RolloutCounts(token, 8)}

    pairs = [pair(0.5, 8, 4), pair(0.1, 8, 0), pair(0.4, 8, 0)]
    assert most_informative(pairs, 2) == [pairs[0], pairs[2]]
    assert most_informative(pairs, None) == pairs


def test_max_triplets_is_kept_and_what_it_drops_is_counted(config):
    report = explore(replace(config, max_triplets=1, limit=1))
    assert report["beyond_max_triplets"] > 0
    assert all(len(json.loads(line)["samples"]) == 1 for line in Path(config.output).read_text().splitlines())


def chat(question="2 + 2?", solution="So the answer is 4.", **extra) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": solution}], **extra}


# --- Progress ---


def test_the_bar_shows_rollouts_at_once_and_an_eta_once_something_is_decided():
    progress = Progress(4, file=StringIO())
    progress.add(0, [[5, 6], [7]])
    progress.add(0, [[8]])
    progress.bar.start_t -= 10  # seconds ago
    assert re.search(r"0.0/4 \[00:10<\?, .*3 rollouts, [\d,]+ tokens/s", str(progress.bar))
    progress.add(0.5)
    assert re.search(r"0.5/4 \[00:10<01:10, ", str(progress.bar))  # 10 s for an eighth
    for _ in range(35):
        progress.add(0.1)
    assert re.search(r"100%.* 4.0/4 \[00:10<00:00, ", str(progress.bar))


@pytest.mark.long
def test_progress_grows_before_a_problem_is_complete_and_ends_at_their_number(quick):
    class RecordedProgress(Progress):
        def add(self, *arguments) -> None:
            super().add(*arguments)
            seen.append(self.bar.n)

    seen: list[float] = []
    tokenizer, task = load_tokenizer(quick.model), load_task("chats", quick.data_file, quick.grader)
    progress = RecordedProgress(20, file=StringIO())
    complete = Explorer(quick, open_engine(quick, tokenizer), tokenizer, task, progress).explore(task.problems("train"))
    next(complete)
    assert 1 < seen[-1] < 20  # more than the one that is complete
    assert sum(1 for _ in complete) == 19
    assert seen == sorted(seen) and seen[-1] == 20 and len(set(seen)) > 20


# --- Interrupted runs and runs of several processes ---


def _run(config: ExploreConfig, lives: int | None) -> None:
    """One process of several; with `lives` it is killed while it writes the entry after so many."""
    write = Journal._write

    def torn(journal: Journal, entry: dict) -> None:
        nonlocal lives
        if lives == 0 and "id" in entry:  # not the header
            journal.file.write(json.dumps(entry).encode()[:20])
            journal.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        lives -= "id" in entry
        write(journal, entry)

    if lives is not None:
        Journal._write = torn
    explore(config)


def run(config: ExploreConfig, world: int, lives: int | None = None) -> list[int]:
    """The exit codes of `world` processes, each of which may complete `lives` problems."""
    return run_ranks(_run, config, lives, world=world)


def num_entries(partial: Path) -> int:
    return sum(path.read_bytes().count(b"\n") - 1 for path in partial.glob("shard-*.jsonl"))


def begins_well(text: str, gold: str) -> bool:
    return text[:5] == gold[:5]


@pytest.fixture
def quick(system1_folder, tmp_path) -> ExploreConfig:
    """Many small problems for a model of random weights: one is complete every few milliseconds."""
    path, random = tmp_path / "chats.jsonl", Random(0)
    solutions = ["".join(random.choices(ascii_lowercase, k=6)) for _ in range(20)]
    path.write_text("".join(json.dumps(chat(f"{i}?", text, id=i)) + "\n" for i, text in enumerate(solutions)))
    return ExploreConfig(
        model=system1_folder,
        output=str(tmp_path / "whole.jsonl"),
        task="chats",
        data_file=str(path),
        grader="test_exploration:begins_well",
        top_k=3,
        max_new_tokens=3,
        batch_size=4,
        device="cpu",
    )


KILLED_RUNS = [(1, 1), (2, 2), (1, 2), (3, 1), (1, 1), (2, 2)]  # processes, problems that each completes


@pytest.mark.long
@pytest.mark.parametrize("killed_runs", [KILLED_RUNS[:2], pytest.param(KILLED_RUNS, marks=pytest.mark.slow)])
def test_output_is_the_same_to_the_byte_after_kills_and_with_any_number_of_processes(quick, monkeypatch, killed_runs):
    """Each process of the killed runs gets a SIGKILL; then two processes complete the exploration."""
    monkeypatch.setattr("llm2.exploration.explore.START_SIZE", 2)
    report = explore(replace(quick, batch_size=64))
    assert report["triplets"] > 5 and report["rejected_as_equal"] > 5
    killed = replace(quick, output=quick.output + ".killed")
    partial, complete = Path(killed.output + ".partial"), 0
    for world, lives in killed_runs:
        assert -signal.SIGKILL in (codes := run(killed, world, lives)) and 0 not in codes  # 1: missed the others
        assert complete < num_entries(partial) <= complete + world * lives and not Path(killed.output).exists()
        complete = num_entries(partial)
    assert run(killed, 2) == [0, 0] and not partial.exists()
    for ending in ("", ".pairs.jsonl"):
        assert Path(killed.output + ending).read_bytes() == Path(quick.output + ending).read_bytes()


@pytest.mark.long
def test_a_run_killed_before_its_journal_is_discarded_is_complete(config):
    report = explore(replace(config, limit=1))
    partial = Path(config.output + ".partial")
    partial.mkdir()
    (partial / "shard-0.jsonl").write_text("{}\n")
    assert explore(replace(config, limit=1)) == json.loads(json.dumps(report))
    assert not partial.exists()


def test_an_existing_output_is_never_overwritten(config):
    Path(config.output).write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        explore(config)
    assert Path(config.output).read_text() == "precious"


def test_a_journal_of_other_settings_is_refused(config):
    other, partial = replace(config, quality_margin=0.9), Path(config.output + ".partial")
    journal = Journal(partial, other, {}, key=itemgetter("id"))
    journal.add({"id": "finished"})
    journal.close()
    with pytest.raises(UserError, match="is of another config: quality_margin was 0.9 and now is"):
        explore(config)


# --- Other people's data ---


@pytest.fixture
def chats(config, tmp_path):
    """Write lines, explore them."""

    def run(*records, **changes) -> dict:
        path = tmp_path / "chats.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
        return explore(replace(config, task="chats", data_file=str(path), limit=None, **changes))

    return run


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{not json", "line 2: not valid JSON"),
        ({"messages": []}, "line 2: expected the key 'messages'"),
        ({"messages": [{"role": "user"}] * 2}, "line 2: key 'messages': expected objects with role and content"),
        ({"messages": chat()["messages"][::-1]}, "line 2: key 'messages': .* found messages by assistant and user"),
        (chat("3 + 3?", "I do not know."), "chats.jsonl: problem line-2: expected one number as gold answer"),
        (chat("3 + 3?", answer="5"), "chats.jsonl: problem line-2: the grader rejects .* for the answer '5'"),
        (chat("3 + 3?", answer=None), "line 2: key 'answer': expected a text or a number, found None"),
        (chat("3 + 3?", id="line-1"), "chats.jsonl: the id 'line-1' stands for 2 problems"),
    ],
)
def test_an_error_in_the_data_names_file_and_line_or_problem(chats, record, message):
    with pytest.raises(UserError, match=message):
        chats(chat(), record)


def test_the_grader_key_replaces_the_tasks_grading(chats, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    (tmp_path / "my_grader.py").write_text("def ends_well(text, gold):\n    return text.endswith(gold)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="no triplets in 1 problems"):
        chats(chat(answer="4."), grader="my_grader:ends_well", gold_rollouts=1, min_rollouts=1, max_rollouts=1)
    for name, message in (("nowhere", "expected MODULE:FUNCTION"), ("nowhere:f", "cannot be imported")):
        with pytest.raises(UserError, match=message):
            chats(chat(), grader=name)


def test_a_template_that_rewrites_the_prompt_is_an_error(config, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% if add_generation_prompt %}<|begin_of_text|>{% endif %}"
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    with pytest.raises(UserError, match="problem train-0: the chat template writes another prompt"):
        explore(replace(config, chat_template=str(template)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "chats"}, "task: chats needs data_file"),
        ({"engine": "vllm"}, "engine: vllm needs top_k"),
        ({"server": "http://localhost:1/v1"}, "expected engine vllm"),
        ({"stop_pattern": "("}, "is no regular expression"),
        ({"stop_pattern": "x", "engine": "vllm", "top_k": 5}, "stop_pattern: found 'x' with engine vllm"),
        ({"min_rollouts": 9}, "expected at most max_rollouts=8"),
    ],
)
def test_keys_that_do_not_fit_together_are_an_error(config, changes, message):
    with pytest.raises(UserError, match=message):
        explore(replace(config, **changes))


def test_a_solution_whose_beginning_joins_the_prompt_is_named():
    """A tokenizer that writes a line break and a space as one token, as SmolLM2's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate([*alphabet, "ĊĠ"])}
    joining = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ġ")]))
    joining.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    joining.decoder = decoders.ByteLevel()
    joining = PreTrainedTokenizerFast(tokenizer_object=joining)
    task = load_task("testbed")
    (problem,) = task.problems("train", 1)
    tokenize_solutions(task, [problem], joining, CHATML_PLAIN, [2])
    spaced = replace(problem, solution=f" {problem.solution}")
    with pytest.raises(
        UserError, match=f"problem {problem.id}: the solution begins with ' .*', which the tokenizer joins"
    ):
        tokenize_solutions(task, [spaced], joining, CHATML_PLAIN, [2])
    tokenize_solutions(task, [spaced], joining, "{% for m in messages %}{{ m['content'] + '|' }}{% endfor %}", [2])
    begin = "{% for m in messages %}{{ ('A' if m['role'] == 'assistant') ~ "
    others = [
        f"{{{{ messages | length }}}}{begin}m['content'] + '|' }}}}{{% endfor %}}",
        f"{begin}('\\n </t>' if m['role'] == 'assistant') ~ m['content'] }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ 'A\\n' }}{% endif %}",  # as those of models that think: <think>\n
    ]
    for other in others:
        with pytest.raises(UserError, match="the chat template writes another prompt before generation"):
            tokenize_solutions(task, [problem], joining, other, [2])


def test_a_token_without_probability_is_not_plausible(loaded, config):
    """With alpha=0 every token is a candidate, those that a processor forbids too."""
    model, tokenizer = loaded
    task = load_task("testbed")
    config = replace(config, alpha=0.0, logits_processor="llm2.decoding.arithmetic:Arithmetic")
    eos = eos_ids(model, tokenizer)
    (solution,) = tokenize_solutions(task, task.problems("train", 1), tokenizer, LLAMA3_PLAIN, eos)
    (forks,) = find_forks(open_engine(config, tokenizer), [solution])
    assert min(p for fork in forks for p in fork.probabilities[1:]) > 0
    sampled = NegativeSampler(replace(config, negatives="sampled"), tokenizer)(solution, forks)
    assert len(sampled) == len(forks)
