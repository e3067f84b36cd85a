"""What may differ between a run and its continuation: exactly the keys that say so of themselves, everywhere."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import ValidationError

from benchmarks.configs import LabelsBenchmark
from experiments.baselines.config import FinetuneConfig
from llm2.common.config_file import as_dict, write_config
from llm2.common.inputs import record, write_inputs
from llm2.common.journal import Journal
from llm2.common.kinds import KINDS_WITH
from llm2.config import EvaluateConfig, ExploreConfig, Mode, TrainConfig
from llm2.errors import UserError
from llm2.evaluation.evaluate import describe
from llm2.evaluation.predictions import Predictions
from llm2.exploration.explore import finished_report
from llm2.verifier.checkpoints import BEGUN
from llm2.verifier.train import checkpoint_to_resume

EXPLORE = ExploreConfig(model="m", task="testbed", output="o")
FINETUNE = FinetuneConfig(model="m", task="testbed", output_dir="o")
EVALUATE = EvaluateConfig(model="m", task="testbed", output_dir="o")
TRAIN = TrainConfig(model="m", train_file="t", output_dir="o")
TRAINS = {f"train {kind}": replace(TRAIN, kind=kind) for kind in ("lora", "prefix_lora", "bilinear")}
LABELS = LabelsBenchmark(benchmark="labels")

# The oracle: written down here, and nowhere in llm2.
ENGINE = {"device", "batch_size", "tensor_parallel", "memory_share", "server", "server_requests"}
HOW = {"explore": {"output", *ENGINE}, "finetune": {"output_dir", *ENGINE}}
HOW["evaluate"] = {"output_dir", "reuse_from", "resume", *ENGINE}
HOW["train"] = {"output_dir", "resume", "report_to", "logging_steps"}
WHICH = {"explore": {"limit", "max_solutions"}, "evaluate": {"limit", "modes", "majority_at", "traced_samples"}}
GUIDED = {"verifier", "contrast", "alpha", "beta", "top_k", "score_samples", "solution_score"}
SAMPLED = {"num_samples", "temperature", "top_p", "seed"}
JOURNALS = {
    "explore": (EXPLORE, HOW["explore"] | WHICH["explore"]),
    "finetune": (FINETUNE, HOW["finetune"] | WHICH["explore"]),
    "evaluate": (EVALUATE, HOW["evaluate"] | WHICH["evaluate"]),
    "train": (TRAIN, HOW["train"]),
    **{name: (config, HOW["train"]) for name, config in TRAINS.items()},  # with the keys of other kinds
    "labels": (LABELS, {"output", "problems", "fixed_rollouts"}),
}


def literals(annotation: Any) -> Iterator[Any]:
    """All values of the Literals within an annotation."""
    for argument in get_args(annotation):
        if get_origin(annotation) is Literal:
            yield argument
        else:
            yield from literals(argument)


def changed(config: Any) -> Iterator[tuple[str, Any]]:
    """Each key of a config, and the config with another value of that key alone."""
    for key, field in type(config).__pydantic_fields__.items():
        values = [*literals(field.annotation), 3, 0.5, "other", True, False, ("other",), (Mode.PLAIN_GREEDY,), (3,)]
        for value in values:
            try:
                other = replace(config, **{key: value})
            except (ValidationError, UserError):
                continue
            if as_dict(other) != as_dict(config):
                yield key, other
                break
        else:
            assert get_args(field.annotation) == ("labels",) or config.kind not in KINDS_WITH[key], f"no value of {key}"


def accepted(config: Any, use: Any) -> set[str]:
    """The keys whose change `use`, which takes a config, does not refuse."""
    keys = set()
    for key, other in changed(config):
        try:
            use(other)
        except UserError as error:
            assert f"of another config: {key} was" in str(error)
        else:
            keys.add(key)
    return keys


@pytest.mark.parametrize("config, expected", JOURNALS.values(), ids=JOURNALS)
def test_a_journal_accepts_exactly_the_keys_that_are_marked(config, expected, tmp_path):
    """`explore` and `finetune` have two, of the exploration and of own solutions: both are this class."""

    def open_journal(config) -> Journal:
        return Journal(tmp_path, config, {}, key=lambda entry: entry["id"])

    journal = open_journal(config)
    journal.add({"id": 1})
    journal.close()
    assert accepted(config, lambda other: open_journal(other).close()) == expected


def test_a_results_folder_accepts_exactly_the_keys_that_are_marked(tmp_path):
    earlier = replace(EVALUATE, output_dir=str(tmp_path))
    write_config(earlier, tmp_path / "config.yaml")
    write_inputs(tmp_path, {})

    def go_on(config) -> None:
        (tmp_path / "predictions.jsonl").touch()
        Predictions(replace(config, output_dir=str(tmp_path), reuse_from=()), {}).journal.discard()

    assert accepted(earlier, go_on) == HOW["evaluate"] | WHICH["evaluate"]


@pytest.mark.one_in(6)
@pytest.mark.parametrize("mode", Mode)
def test_predictions_are_reused_if_no_key_that_their_mode_depends_on_differs(mode, tmp_path):
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    begun = replace(EVALUATE, score_samples=False)
    write_config(begun, earlier / "config.yaml")
    write_inputs(earlier, {})
    entry = {"id": "a", "question": "", "gold": "", "mode": mode, "samples": [{"score": 0.5}]}
    (earlier / "predictions.jsonl").write_text(json.dumps(entry) + "\n")

    def reuse(config) -> bool:
        """Whether the prediction still has its score."""
        config = replace(config, output_dir=str(tmp_path / "now"), reuse_from=(str(earlier),))
        predictions = Predictions(config, {})
        (found,) = predictions.journal.read([("a", mode)])
        predictions.journal.discard()
        return found["samples"][0]["score"] is not None

    used = [(mode.guided, GUIDED), (mode.sampled, SAMPLED), (mode.searched, {"search_solutions", "alpha", "top_k"})]
    unused = set().union(*(keys for depends, keys in used if not depends))
    unused -= set().union(*(keys for depends, keys in used if depends))
    kept = HOW["evaluate"] | WHICH["evaluate"] | unused
    assert accepted(begun, reuse) == kept
    unscored = {key for key, other in changed(begun) if key in kept and not reuse(other)}
    assert unscored == {"verifier", "solution_score"} & unused, "of another verifier, or summarised in another way"


def test_a_checkpoint_accepts_exactly_the_keys_that_are_marked(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{}")
    (tmp_path / BEGUN).write_text(json.dumps(record(TRAIN, {})))

    def resume(config) -> None:
        assert checkpoint_to_resume(replace(config, output_dir=str(tmp_path), resume=True), {}) is not None

    assert accepted(TRAIN, resume) == HOW["train"]


def test_a_finished_exploration_is_another_one_unless_all_but_how_it_worked_is_equal(tmp_path):
    output = str(tmp_path / "t.jsonl")
    Path(f"{output}.report.json").write_text(json.dumps({"config": as_dict(EXPLORE), "inputs": {}}))
    same = {key for key, other in changed(EXPLORE) if finished_report(replace(other, output=output), {}) is not None}
    assert same == HOW["explore"]


def test_metrics_show_the_settings_that_are_marked():
    assert describe(EVALUATE, {}, 1)["settings"].keys() == {
        *("model", "verifier", "contrast", "alpha", "beta", "top_k", "temperature", "top_p", "num_samples"),
        *("search_solutions", "logits_processor", "accept", "few_shot", "num_fewshot", "seed"),
    }
