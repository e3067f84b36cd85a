"""A study runs every combination once, goes on where it stopped, and averages over seeds."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments.__main__ import main
from experiments.study import run as study
from experiments.study.bootstrap import seeds_bootstrap
from experiments.study.config import StudyConfig, StudyCurves, StudyStep
from experiments.study.plot import draw_curves
from experiments.study.results import as_published, in_one_column, read_published, results
from experiments.study.summary import rows
from experiments.study.table import write_summary
from llm2.common.config_file import load_config, write_config
from llm2.config import EvaluateConfig
from llm2.errors import UserError

STEP = {"name": "greedy", "command": "evaluate", "done": "{run}/greedy/metrics.json"}
SET = {"output_dir": "{run}/greedy", "seed": "{seed}", "modes": ["guided_greedy"]}


@pytest.fixture
def config(tmp_path) -> StudyConfig:
    values = {
        "output_dir": str(tmp_path / "runs"),
        "report": str(tmp_path / "figs" / "small"),
        "axes": {
            "seed": {"0": {}, "1": {}},
            "kind": {
                "old": {},
                "new": {"all": {"top_k": 5, "score": "prefix"}, "greedy": {"beta": 1e-3, "verifier": "{study}/{kind}"}},
            },
        },
        "skip": [{"kind": ["new"], "seed": ["1"]}],
        "steps": [
            {
                **STEP,
                "config": "configs/testbed/evaluate.yaml",
                "set": {
                    "output_dir": "{run}/greedy",
                    "seed": "{seed}",
                    "modes": ["guided_greedy"],
                    "reuse_from": ["{study}"],
                },
            }
        ],
        "baseline": {"kind": "old"},
        "columns": {"greedy tokens_per_problem": "tokens"},
        "correlate": ["greedy tokens_per_problem"],
        "given": {"kind": {"old": {"speed": 0.5}}},
        "plots": {"cost": {"x": "{column} tokens_per_problem", "label": "tokens", "colour": "kind", "marker": "kind"}},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return load_config(StudyConfig, path)


def write_evaluation(folder: Path, right: list[bool]) -> None:
    folder.mkdir(parents=True)
    samples = [[{"answer": "1" if ok else "2", "correct": ok}] for ok in right]
    lines = [{"mode": "guided_greedy", "samples": one} for one in samples]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "metrics.json").write_text(
        json.dumps({"modes": {"guided_greedy": {"tokens_per_problem": 10 - 2 * sum(right)}}})
    )


def test_axes_override_the_steps_keys_and_fill_names_in(config):
    runs = study.runs(config)
    assert [one.values for one in runs] == [
        {"seed": "0", "kind": "old"},
        {"seed": "0", "kind": "new"},
        {"seed": "1", "kind": "old"},
    ]
    new = runs[1]
    assert list(study.arguments(config, config.steps[0], study.names_of(config, new))) == [
        *("top_k=5", f"output_dir={new.folder}/greedy", "seed=0", "modes=[guided_greedy]"),
        f"reuse_from=[{config.output_dir}]",
        *("beta=0.001", f"verifier={config.output_dir}/new"),
    ]


def test_done_steps_are_skipped_and_a_failure_is_told_after_the_others(config, monkeypatch, capsys):
    started = []

    def fake(command, env, **_):
        started.append(command)
        failed = any("0-new" in argument for argument in command)
        if not failed:
            folder = next(a.removeprefix("output_dir=") for a in command if a.startswith("output_dir="))
            write_evaluation(Path(folder), [True])
        return type("Done", (), {"returncode": 2 * failed})

    monkeypatch.setattr(study.subprocess, "run", fake)
    for expected, shown in ((3, "0/3 "), (4, "2/3 ")):  # the second time only the failed run
        with pytest.raises(UserError, match="1 of 3 runs failed; the first: evaluate ended with status 2; its log is"):
            study.run(config)
        assert len(started) == expected
        bar = capsys.readouterr().err
        assert shown in bar.split("\r")[1] and "2/3 " in bar.split("\r")[-1], "a bar counts steps, those of earlier too"


def test_a_step_that_was_done_with_other_settings_is_told_not_skipped(config):
    one, step = study.runs(config)[1], config.steps[0]
    written = one.folder / "greedy" / "config.yaml"
    write_evaluation(written.parent, [True])
    study.check(config)  # a folder without its config is taken as it is
    asked = list(study.arguments(config, step, study.names_of(config, one)))
    same = load_config(EvaluateConfig, step.config, asked)
    moved = replace(same, output_dir="elsewhere", verifier="elsewhere", batch_size=7)
    write_config(moved, written)
    study.check(config)  # paths with names in braces, and keys that the study leaves alone
    write_config(replace(moved, top_k=4), written)
    with pytest.raises(UserError, match="metrics.json: top_k was 4 and now is 5 in the study; delete what"):
        study.run(config)
    assert main(["study", str(Path(config.output_dir).parent / "small.yaml"), "--summary"]) == 2
    report = written.with_name("t.jsonl.report.json")
    explored = StudyStep(
        name="e", command="explore", config="configs/testbed/explore.yaml", set={"limit": 5}, done=str(report)
    )
    asked_for = {"limit": 5, "top_k": 5, "model": "testbed", "task": "testbed", "max_new_tokens": 200}
    for key, found, now in (("limit", 4, 5), ("max_new_tokens", 100, 200)):  # of the step, and of its config file
        report.write_text(json.dumps({"config": asked_for | {key: found}}))
        with pytest.raises(UserError, match=f"report.json: {key} was {found} and now is {now}"):
            study.check_done(config, explored, one)
    report.write_text(json.dumps({"config": asked_for | {"batch_size": 7, "alpha": 0.3}}))
    study.check_done(config, explored, one)  # how a step worked, and a default
    report.write_text('{"config": ')
    with pytest.raises(UserError, match="report.json.* not valid YAML"):
        study.check_done(config, explored, one)


def test_training_of_an_earlier_version_is_known_by_its_kind(config, tmp_path):
    """Its keys may stand in the study, for all steps too, and in the folder that it left."""
    done = tmp_path / "verifier" / "training.json"
    done.parent.mkdir()
    done.touch()
    files = {"model": "testbed", "train_file": "t", "output_dir": str(done.parent)}
    done.with_name("train.yaml").write_text(yaml.safe_dump({**files, "score": "prefix", "prefix_head": None}))
    step = StudyStep(name="train", command="train", set=files, done=str(done))
    old, new = study.Run({"seed": "0", "kind": "old"}, tmp_path), study.Run({"seed": "0", "kind": "new"}, tmp_path)
    assert study.overrides(config, step, study.names_of(config, new)) == {**files, "kind": "prefix"}
    study.check_done(config, step, new)
    study.check_done(config, replace(step, set={**files, "score": "prefix"}), old)
    for other in ({"kind": "full"}, {"score": "candidate"}, {"kind": "mlp"}):
        with pytest.raises(UserError, match="kind was 'prefix' and now is"):
            study.check_done(config, replace(step, set={**files, **other}), old)


def test_a_step_without_a_command_takes_what_another_study_has_written(config, tmp_path):
    other = StudyStep(name="other", done=f"{tmp_path}/other/{{kind}}/metrics.json", only={"kind": ["old"]})
    config = replace(config, steps=(other,), skip=(), axes=config.axes | {"kind": {"old": {}, "new": {}}})
    assert [one.values for one in study.runs(config)] == [{"seed": s, "kind": "old"} for s in "01"], "new has no step"
    with pytest.raises(UserError, match="other: expected .*other/old/metrics.json, which another study writes"):
        study.run(config)
    write_evaluation(tmp_path / "other" / "old", [True, False])
    study.run(config)
    (row,) = rows(config, in_one_column(results(config)))
    assert row.accuracies["greedy"].mean == 0.5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"axes": {"seed": {"0": {"greedi": {}}}, "kind": {"old": {}}}}, "no step is called 'greedi'"),
        ({"skip": [{"kind": ["odd"]}]}, "skip: expected values of an axis, found kind"),
        ({"over": "sed"}, "expected axes, found 'sed'"),
        ({"curves": {"x": "sizes"}}, "expected axes, found 'sizes'"),
        ({"curves": {"x": "kind"}}, "curves: x: kind: expected numbers, found 'old'"),
        ({"steps": [{**STEP, "command": "evalu"}]}, "command: found 'evalu', expected one of explore"),
        ({"steps": [{**STEP, "set": {"bata": 1}}]}, "unknown key 'bata'; did you mean 'beta'"),
        ({"steps": [{**STEP, "only": {"kind": ["odd"]}}]}, "only: expected values of an axis, found kind"),
    ],
)
def test_axes_and_steps_must_fit_together(config, tmp_path, change, message):
    values = yaml.safe_load((tmp_path / "small.yaml").read_text()) | change
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(UserError, match=message):
        study.run(load_config(StudyConfig, tmp_path / "other.yaml"))


def test_the_summary_averages_over_seeds_and_pairs_equal_seeds(config):
    for seed, right in (("0", [True, True, False, False]), ("1", [True, False, False, False])):
        write_evaluation(Path(config.output_dir, f"{seed}-old", "greedy"), right)
    write_evaluation(Path(config.output_dir, "0-new", "greedy"), [True, True, True, False])
    old, new = rows(config, in_one_column(results(config)))
    assert old.values == {"kind": "old"} and old.seeds == 2 and not old.against_baseline
    assert old.accuracies["greedy"].mean == pytest.approx(3 / 8)
    assert new.against_baseline["greedy"].mean == pytest.approx(1 / 4), "against seed 0 alone"
    text = write_summary(config)
    assert "| new  | 1     | 75.0" in text
    assert "over 3 runs: Spearman -1.00, Pearson -1.00" in text
    assert {path.name for path in Path(config.report).parent.iterdir()} == {
        *("small.md", "small.json", "small.runs.jsonl", "small_cost.svg"),
    }
    write_summary(replace(config, plots={}))
    plot = Path(config.report).with_suffix(".svg").read_text()
    assert ">old<" in plot and ">new<" in plot, "without plots, one with every row"
    text = write_summary(replace(config, seen_problems=2))
    assert text.startswith(write_summary(config)) and "Without the first 2 problems" in text
    assert "| new  | 1     | 50.0" in text.partition("Without")[2], "of the last two"
    assert old.figures["speed"] == 0.5 and "speed" not in new.figures


def test_runs_of_another_machine_are_taken_as_published_unless_their_settings_changed(config):
    write_evaluation(Path(config.output_dir, "0-old", "greedy"), [True, True, False, False])
    first = write_summary(config)
    shutil.rmtree(config.output_dir)
    assert write_summary(config) == first
    write_evaluation(Path(config.output_dir, "0-new", "greedy"), [True, True, True, False])
    assert "| new  | 1     | 75.0 [25.0, 100.0]; +25.0" in write_summary(config), "paired with the published run"
    write_evaluation(Path(config.output_dir, "0-old", "greedy"), [False] * 4)
    assert "| old  | 1     | 0.0" in write_summary(config), "what is here counts"
    shutil.rmtree(config.output_dir)
    assert [one.values["kind"] for one in results(config)] == ["old", "new"]
    config.axes["kind"]["new"]["greedy"]["beta"] = 2.0
    assert [one.values["kind"] for one in results(config)] == ["old"]
    Path(config.report + ".runs.jsonl").write_text('{"values": {}}')
    with pytest.raises(UserError, match="runs.jsonl, line 1: expected a run as a study publishes it"):
        results(config)


def test_votes_are_published_as_they_are(config):
    folder = Path(config.output_dir, "0-old", "greedy")
    write_evaluation(folder, [True])
    samples = [{"answer": "1", "correct": True}, {"answer": "2", "correct": False}, {"answer": "1", "correct": True}]
    lines = [{"mode": "guided_sampling", "samples": samples[:n]} for n in (2, 3)]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "metrics.json").write_text(json.dumps({"modes": {"guided_sampling": {}}}))
    write_summary(replace(config, plots={}))
    (one,) = read_published(config)
    assert one.problems["guided sampling"].tolist() == [0.5, 1.0]


@pytest.mark.parametrize("path", sorted(Path("experiments/results").glob("*.runs.jsonl")), ids=lambda path: path.name)
def test_published_runs_were_made_with_the_settings_of_their_study(path, tmp_path):
    name = path.name.removesuffix(".runs.jsonl")
    config = load_config(StudyConfig, f"experiments/studies/{name}.yaml")
    assert str(path) == f"{config.report}.runs.jsonl"
    found = results(replace(config, output_dir=str(tmp_path)))
    assert len(found) == len(read_published(config)), "runs that its config does not ask for"


def test_the_settings_of_a_kind_that_training_refuses_have_a_digest_too():
    assert as_published({"kind": "candidate", "seed": 1}) == {"kind": "candidate", "seed": 1}


def test_only_some_runs_are_run(config, monkeypatch):
    started = []
    monkeypatch.setattr(study, "run_step", lambda config, step, one: started.append(one.values))
    study.run(config, ["kind=old", "seed=1", "seed=0"])
    assert sorted(one["seed"] for one in started) == ["0", "1"] and {one["kind"] for one in started} == {"old"}
    with pytest.raises(UserError, match="--only 'kind=odd': expected one of seed=0, seed=1, kind=old, kind=new"):
        study.run(config, ["kind=odd"])
    with pytest.raises(SystemExit):  # of argparse: one or the other
        main(["study", "small.yaml", "--summary", "--only", "kind=old"])


def test_tables_across_an_axis_and_curves_over_numbers(config):
    config = replace(config, across="kind", plots={}, curves=StudyCurves(x="seed", panels="kind"), over=None)
    for seed, right in (("0", [True, True, False, False]), ("1", [True, False, False, False])):
        write_evaluation(Path(config.output_dir, f"{seed}-old", "greedy"), right)
    text = write_summary(config)
    accuracy, tokens = (part.split("\n\n")[0].splitlines() for part in text.split("| seed")[1:])
    assert accuracy[2].endswith("100.0] | not run |") and tokens[2:] == [
        "| 0    | 6   | not run |",
        "| 1    | 8   | not run |",
    ]
    (panel,) = draw_curves(config, rows(config, in_one_column(results(config)))).axes
    assert panel.get_title() == "old" and panel.get_xlabel() == "seed"
    (points,) = [line for line in panel.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o"]
    assert points.get_xydata().tolist() == [[0, 0.5], [1, 0.25]]
    assert ">old<" in Path(config.report).with_suffix(".svg").read_text()


def test_a_run_with_both_ways_of_decoding_keeps_the_modes_apart_in_all_runs(config):
    for name, modes in (("0-old", ["plain_greedy", "guided_greedy"]), ("0-new", ["guided_greedy"])):
        folder = Path(config.output_dir, name, "greedy")
        write_evaluation(folder, [True, False])
        lines = [{"mode": mode, "samples": [{"answer": "1", "correct": True}]} for mode in modes]
        (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        figures = {mode: {"tokens_per_problem": 5} for mode in modes}
        (folder / "metrics.json").write_text(json.dumps({"modes": figures}))
    old, new = rows(config, in_one_column(results(config)))
    assert list(old.accuracies) == ["plain greedy", "guided greedy"] and list(new.accuracies) == ["guided greedy"]
    assert new.figures["guided greedy tokens_per_problem"] == 5 and "guided greedy" in new.against_baseline


def test_the_bootstrap_covers_seeds_and_problems():
    generator = np.random.default_rng(0)
    problems = generator.random((1, 400)) < 0.5
    one = seeds_bootstrap(np.repeat(problems, 3, axis=0).astype(float))
    low, high = one.ci95
    assert one.mean == pytest.approx(problems.mean()) and low < one.mean < high
    assert high - low == pytest.approx(4 * 0.5 / 20, rel=0.15), "equal seeds add nothing to the spread over problems"
    shifted = seeds_bootstrap(np.repeat(problems, 3, axis=0) + np.array([[-0.3], [0.0], [0.3]]))
    assert shifted.ci95[1] - shifted.ci95[0] > 2 * (high - low), "unequal seeds widen it"
    assert seeds_bootstrap(np.full((2, 50), 0.1)).p == pytest.approx(2 / 10_000)
    assert seeds_bootstrap(np.array([[1.0, -1.0] * 20])).p > 0.8


def test_plain_and_guided_search_stand_in_one_column(config):
    for name, mode in (("0-old", "plain_search"), ("0-new", "guided_search")):
        folder = Path(config.output_dir, name, "greedy")
        write_evaluation(folder, [True, False])
        line = {"mode": mode, "samples": [{"answer": "1", "correct": name == "0-new"}]}
        (folder / "predictions.jsonl").write_text(json.dumps(line) + "\n")
        (folder / "metrics.json").write_text(json.dumps({"modes": {mode: {"tokens_per_problem": 80}}}))
    old, new = rows(config, in_one_column(results(config)))
    assert (old.accuracies["search"].mean, new.accuracies["search"].mean) == (0, 1)
    assert new.against_baseline["search"].mean == 1 and new.figures["search tokens_per_problem"] == 80
