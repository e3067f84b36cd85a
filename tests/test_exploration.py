"""Exploration: forks, qualities, the decision, the journal that survives a kill."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import beta

from llm2.benchmarks import load_problems
from llm2.chat import LLAMA3_PLAIN
from llm2.config import ExploreConfig
from llm2.errors import UserError
from llm2.exploration import encode_golds, explore, find_forks, probability_worse
from llm2.models import eos_ids, load_system1, load_tokenizer
from llm2.triplets import load_examples

SYSTEM1 = "llm2/testbed/system1"


@pytest.fixture(scope="module")
def loaded():
    return load_system1(SYSTEM1, torch.device("cpu")), load_tokenizer(SYSTEM1)


@pytest.fixture
def config(tmp_path) -> ExploreConfig:
    return ExploreConfig(
        model=SYSTEM1,
        output=str(tmp_path / "triplets.jsonl"),
        benchmark="testbed",
        limit=6,
        rollouts=6,
        max_new_tokens=160,
        confidence=0.9,
        batch_size=64,
        device="cpu",
    )


def test_forks_are_where_more_than_one_token_is_plausible(loaded):
    """Against the definition, position by position, from one forward a prefix."""
    model, tokenizer = loaded
    (gold,) = encode_golds(load_problems("testbed", "train", 1), tokenizer, LLAMA3_PLAIN, eos_ids(model, tokenizer))
    forks = {fork.position: fork.tokens for fork in find_forks(model, gold, 0.1, None)}
    assert tokenizer.decode(gold.ids[gold.start : gold.end - 1]) == gold.problem.solution
    assert gold.ids[gold.end - 1] == tokenizer.eos_token_id
    for position in range(gold.start, gold.end):
        with torch.inference_mode():
            p = model(torch.tensor([gold.ids[:position]])).logits[0, -1].softmax(-1)
        plausible = set((p >= 0.1 * p.max()).nonzero().flatten().tolist())
        if len(plausible) > 1:
            assert set(forks[position]) == plausible | {gold.ids[position]}
            assert forks[position][0] == gold.ids[position]
        else:
            assert position not in forks


def test_probability_worse_agrees_with_sampling_the_posteriors():
    gold, token = (beta.rvs(1 + h, 1 + 8 - h, size=200_000, random_state=h) for h in (5, 1))
    assert probability_worse(1, 5, 8, 0.1) == pytest.approx((gold - token > 0.1).mean(), abs=0.005)


def test_probability_worse_orders_as_it_should():
    assert probability_worse(0, 8, 8, 0.1) > 0.99
    assert probability_worse(4, 4, 8, 0.1) < 0.5
    assert probability_worse(8, 0, 8, 0.1) < 0.01
    assert probability_worse(0, 4, 8, 0.1) < probability_worse(0, 40, 80, 0.1)


def test_explored_triplets_fit_the_format_and_prefer_gold(config, loaded):
    report = explore(config)
    examples, summary = load_examples(config.output, loaded[1], LLAMA3_PLAIN)
    assert summary.triplets == report["triplets"] > 0 and summary.duplicates == 0
    assert report["problems"] == 6 and report["rollouts"] == 6 * report["candidates"]
    assert report["candidates"] == report["forks"] + report["triplets"] + report["rejected"]
    for line in Path(config.output).read_text().splitlines():
        record = json.loads(line)
        assert len(record["quality"]) == len(record["samples"])
        assert all(gold > negative + config.margin for gold, negative in record["quality"])


def test_the_result_does_not_depend_on_batch_size_or_a_kill(config, tmp_path, monkeypatch):
    explore(config)
    whole = Path(config.output).read_text()

    monkeypatch.setattr("llm2.exploration.CHUNK", 2)
    again = replace(config, output=str(tmp_path / "again.jsonl"), batch_size=24)

    def kill(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("llm2.exploration.Journal.publish", kill)
    with pytest.raises(KeyboardInterrupt):
        explore(replace(again, limit=4))
    monkeypatch.undo()
    journal = Path(again.output + ".partial")
    journal.write_bytes(journal.read_bytes()[:-40])  # the last line is torn, as a kill may leave it
    explore(again)
    assert Path(again.output).read_text() == whole
    assert not journal.exists()


def test_what_was_explored_is_never_written_over(config):
    Path(config.output).write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        explore(config)
    assert Path(config.output).read_text() == "precious"


def test_a_journal_of_other_settings_is_refused(config):
    Path(config.output + ".partial").write_text('{"seed": 1}\n')
    with pytest.raises(UserError, match="begun with another config: model was None and now is"):
        explore(config)
