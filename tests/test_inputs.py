"""A run that goes on from an earlier one refuses where anything that both read has other contents now."""

import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from pydantic.dataclasses import dataclass as config_class
from test_train import write_triplets

from experiments.study.run import check_done
from llm2.common.chat import LLAMA3_PLAIN
from llm2.common.inputs import INPUTS, change, digests
from llm2.common.loading import TESTBED, load_tokenizer
from llm2.config import STRICT, Code, EvaluateConfig, ExploreConfig, Model, TrainConfig
from llm2.errors import UserError
from llm2.evaluation.evaluate import evaluate
from llm2.exploration import explore as exploration
from llm2.exploration.explore import explore
from llm2.verifier.model import ProcessVerifier
from llm2.verifier.train import train

CHANGED = r"has changed, SHA-256 [0-9a-f]{12} before and [0-9a-f]{12} now"
GRADER = "def right(text, gold):\n    return {}\n"


def save_verifier(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    ProcessVerifier.from_system1("testbed").save_pretrained(folder)


def write_problems(path: Path, gold: str = "5") -> None:
    with path.open("w") as file:
        for name in ("Nina", "Ben", "Ada"):
            question = f"{name} has 2 shells. Sam has 3 more shells than {name}. How many shells does Sam have?"
            solution = {"role": "assistant", "content": "2 + 3 = 5\n#### 5"}
            messages = [{"role": "user", "content": question}, solution]
            file.write(json.dumps({"id": name, "messages": messages, "answer": gold}) + "\n")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> tuple[Path, EvaluateConfig]:
    """A results folder and all that it was made from, every kind of input among it."""
    folder = tmp_path_factory.mktemp("evaluated")
    save_verifier(folder / "verifier", 0)
    write_problems(folder / "problems.jsonl")
    (folder / "examples.jsonl").write_text('{"question": "1 + 1 = ?", "answer": "#### 2"}\n')
    (folder / "template.jinja").write_text(load_tokenizer("testbed").chat_template)
    (folder / "stale_grader.py").write_text(GRADER.format(True))
    shutil.copytree(TESTBED, folder / "system1")
    config = EvaluateConfig(
        model="system1",
        verifier="verifier",
        task="chats",
        data_file="problems.jsonl",
        few_shot="examples.jsonl",
        chat_template="template.jinja",
        grader="stale_grader:right",
        output_dir="results",
        max_new_tokens=5,
        device="cpu",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        evaluate(config)
    return folder, config


@pytest.fixture
def results(evaluated, tmp_path, monkeypatch) -> EvaluateConfig:
    """A copy of them, in the working directory."""
    folder, config = evaluated
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.syspath_prepend(tmp_path / "copy")
    monkeypatch.delitem(sys.modules, "stale_grader")
    return config


def append(path: str, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


CHANGES = {
    "a verifier trained anew": ("model.safetensors", lambda: save_verifier(Path("verifier"), 1)),
    "a gold answer corrected": ("problems.jsonl", lambda: write_problems(Path("problems.jsonl"), "6")),
    "another example": ("examples.jsonl", lambda: append("examples.jsonl", '{"question": "2?", "answer": "#### 2"}\n')),
    "another template": ("template.jinja", lambda: append("template.jinja", "!")),
    "another grader": ("stale_grader.py", lambda: Path("stale_grader.py").write_text(GRADER.format(False))),
    "another tokenizer": ("tokenizer_config.json", lambda: append("system1/tokenizer_config.json", " ")),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name, edit", CHANGES.values(), ids=CHANGES)
def test_an_evaluation_is_never_repeated_from_predictions_of_other_contents(results, name, edit):
    before = Path("results/metrics.json").read_bytes()
    assert evaluate(results)["n"] == 3, "nothing has changed yet"
    edit()
    with pytest.raises(
        UserError, match=rf"results/predictions.jsonl is out of date: the content of {name} .*{CHANGED}"
    ):
        evaluate(results)
    assert Path("results/metrics.json").read_bytes() == before
    other = replace(results, output_dir="other", reuse_from=("results",))
    if name == "model.safetensors":  # of the verifier: plain predictions are as they were
        evaluate(other)
        lines = [json.loads(line) for line in Path("other/predictions.jsonl").read_text().splitlines()]
        assert {line["mode"] for line in lines if line["samples"][0]["score"] is not None} == {"guided_greedy"}
    else:
        with pytest.raises(UserError, match=f"out of date: the content of {name} .*cannot be reused"):
            evaluate(other)
    assert evaluate(replace(results, resume=False))["n"] == 3


def test_plain_predictions_outlive_another_verifier(results):
    plain = replace(results, output_dir="plain", modes=("plain_greedy",))
    evaluate(plain)
    save_verifier(Path("verifier"), 1)
    evaluate(replace(plain, output_dir="again", reuse_from=("plain",)))
    old, new = (json.loads(Path(f, "predictions.jsonl").read_text().splitlines()[0]) for f in ("plain", "again"))
    assert new["samples"][0]["text"] == old["samples"][0]["text"]
    assert old["samples"][0]["score"] is not None and new["samples"][0]["score"] is None, "of the old verifier"


def test_results_of_a_version_without_digests_are_not_continued(results):
    Path("results", INPUTS).unlink()
    with pytest.raises(UserError, match="out of date: an older version .* did not record .*; choose another"):
        evaluate(results)


def test_metrics_name_what_was_read(results):
    inputs = json.loads(Path("results/metrics.json").read_text())["inputs"]
    assert inputs == json.loads(Path("results", INPUTS).read_text()) == digests(results)
    assert set(inputs) == {"model", "verifier", "task", "data_file", "few_shot", "chat_template", "grader"}
    for path in ("verifier/model.safetensors", "system1/tokenizer.json", "problems.jsonl", "template.jinja"):
        digest = sha256(Path(path).read_bytes()).hexdigest()
        assert any(files.get(Path(path).name) == digest for files in inputs.values()), path


def test_a_killed_exploration_never_mixes_two_contents_of_its_data(tmp_path, monkeypatch):
    write_problems(tmp_path / "problems.jsonl")
    config = ExploreConfig(
        model="testbed",
        task="chats",
        data_file=str(tmp_path / "problems.jsonl"),
        output=str(tmp_path / "triplets.jsonl"),
        max_new_tokens=5,
        max_rollouts=2,
        device="cpu",
    )
    entry, entries = exploration.journal_entry, []

    def killed(*arguments):
        entries.append(arguments)
        if len(entries) == 2:
            raise KeyboardInterrupt
        return entry(*arguments)

    monkeypatch.setattr(exploration, "journal_entry", killed)
    with pytest.raises(KeyboardInterrupt):
        explore(config)
    write_problems(tmp_path / "problems.jsonl", "5.0")
    with pytest.raises(UserError, match=f"out of date: the content of problems.jsonl .*{CHANGED}; set that"):
        explore(config)


@pytest.fixture
def trained(system1_folder, tmp_path) -> TrainConfig:
    write_triplets(tmp_path / "triplets.jsonl", load_tokenizer(system1_folder), 20)
    config = TrainConfig(
        model=system1_folder,
        train_file=str(tmp_path / "triplets.jsonl"),
        output_dir=str(tmp_path / "verifier"),
        eval_share=0.2,
        num_train_epochs=1.0,
        global_batch_size=8,
        per_device_train_batch_size=4,
        device="cpu",
    )
    train(config)
    return config


def test_a_verifier_is_never_resumed_with_other_triplets(trained):
    weights = Path(trained.output_dir, "model.safetensors").read_bytes()
    card = Path(trained.output_dir, "README.md").read_text()
    digest = sha256(Path(trained.train_file).read_bytes()).hexdigest()
    assert f"| SHA-256 of `triplets.jsonl` (train_file) | {digest[:12]} |" in card
    assert "| SHA-256 of `model.safetensors` (model) |" in card
    train(trained)
    write_triplets(trained.train_file, load_tokenizer(trained.model), 16)
    with pytest.raises(UserError, match=f"out of date: the content of triplets.jsonl .*{CHANGED}; choose another"):
        train(trained)
    assert Path(trained.output_dir, "model.safetensors").read_bytes() == weights


def test_a_training_killed_before_its_end_leaves_the_records_of_the_weights_that_are_there(trained, monkeypatch):
    folder = Path(trained.output_dir)
    records = ("train.yaml", INPUTS, "README.md", "model.safetensors", "training.json")
    before = {name: (folder / name).read_bytes() for name in records}
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    write_triplets(trained.train_file, load_tokenizer(trained.model), 16)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.Trainer.train", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(replace(trained, seed=1))
    assert {name: (folder / name).read_bytes() for name in records} == before
    train(replace(trained, seed=1))
    assert all((folder / name).read_bytes() != content for name, content in before.items())


@pytest.mark.parametrize("content", ["[]", "3", '{"model": null}', '{"model": {"a": 1}}', "{", ""])
def test_damaged_digests_are_an_error_in_a_sentence(results, content):
    Path("results", INPUTS).write_text(content)
    with pytest.raises(UserError, match=r"results/inputs.json: expected digests as a run writes them"):
        evaluate(results)


def test_a_refused_reuse_leaves_nothing_that_binds_the_next_run(results):
    other = replace(results, output_dir="other", reuse_from=("results",))
    problems = Path("problems.jsonl").read_text()
    write_problems(Path("problems.jsonl"), "6")
    with pytest.raises(UserError, match="cannot be reused"):
        evaluate(other)
    Path("problems.jsonl").write_text(problems)
    assert evaluate(other)["n"] == 3


def test_a_pipe_is_refused_as_an_input(results):
    os.mkfifo("pipe")
    with pytest.raises(UserError, match="pipe: expected a file, found a pipe or device"):
        evaluate(replace(results, data_file="pipe"))


def test_deleting_checkpoints_leads_to_no_stale_results(results):
    """The way that `train` used to advise: checkpoints away, the same folder, the same evaluation."""
    save_verifier(Path("verifier"), 2)
    with pytest.raises(UserError, match="verifier"):
        evaluate(results)


@config_class(frozen=True, config=STRICT, kw_only=True)
class OneModel:
    model: Model


@config_class(frozen=True, config=STRICT)
class OneTask:
    task: Code


def test_what_the_testbed_is_made_of_counts_with_its_code(monkeypatch):
    read = []
    monkeypatch.setattr("llm2.common.inputs.digest", lambda path: read.append(path.name) or "0" * 64)
    assert "llm2/testbed" not in digests(OneTask(task="gsm8k"))["task"]
    read.clear()
    of_testbed = digests(OneTask(task="testbed"))["task"]
    assert {*of_testbed} == {"llm2/tasks", "llm2/testbed"} and {"facts.toml", "generator.py", "task.py"} <= {*read}
    of_regime = digests(OneTask(task="experiments.testbed.regimes:Foreign"))["task"]
    assert of_regime == of_testbed | {"regimes.py": "0" * 64}


def test_a_hub_id_counts_as_its_commit(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--model" / "snapshots" / ("a" * 40)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: str(snapshot / file))
    assert digests(OneModel(model="someone/model")) == {"model": {"someone/model": snapshot.name}}


def test_shards_of_deepspeed_count_where_no_other_weights_are(tmp_path):
    (tmp_path / "global_step2").mkdir()
    (tmp_path / "global_step2" / "shard.pt").write_text("weights")
    (tmp_path / "latest").write_text("global_step2")
    for name in ("training.json", "notes.txt", "triplets.jsonl.report.json", "._config.json"):
        (tmp_path / name).write_text("not read")
    (tmp_path / "config.json").mkdir()
    (tmp_path / "tokenizer.json").symlink_to("nowhere")
    assert set(digests(OneModel(model=str(tmp_path)))["model"]) == {"shard.pt"}
    (tmp_path / "model.safetensors").write_text("gathered")
    assert set(digests(OneModel(model=str(tmp_path)))["model"]) == {"model.safetensors"}


def test_a_change_names_the_first_file_that_differs():
    before = {"model": {"a.json": "0" * 64, "b.json": "1" * 64}, "verifier": {"c.json": "2" * 64}}
    assert change(before, before) is None
    after = {"model": {"a.json": "0" * 64, "d.json": "3" * 64}}
    assert change(before, after) == "b.json (key 'model') is missing"
    assert change(after, before) == "b.json (key 'model') is new"
    assert change(before, after, ("model",)) == "c.json (key 'verifier') is missing"
    assert change(before, after, ("model", "verifier")) is None
    after = before | {"verifier": {"c.json": "3" * 64}}
    assert "c.json (key 'verifier') has changed, SHA-256 222222222222 before and 333" in change(before, after)


@dataclass
class Step:
    command: str
    done: str
    name: str = "evaluate"
    config: None = None


def test_a_study_notices_that_a_verifier_was_trained_after_its_evaluation(results, monkeypatch):
    step = Step("evaluate", "results/metrics.json")
    monkeypatch.setattr("experiments.study.run.names_of", lambda *_: {})
    monkeypatch.setattr("experiments.study.run.overrides", lambda *_: {})
    monkeypatch.setattr("experiments.study.run.load_config", lambda *_: results)
    monkeypatch.setattr("experiments.study.run.arguments", lambda *_: iter(()))
    check_done(None, step, None)
    save_verifier(Path("verifier"), 1)
    with pytest.raises(UserError, match=f"metrics.json is out of date: .*model.safetensors .*{CHANGED}; delete what"):
        check_done(None, step, None)
    shutil.rmtree("verifier")
    with pytest.raises(UserError, match="config.json .key 'verifier'. is missing"):
        check_done(None, step, None)
    check_done(None, step, None, summary=True)


def test_the_plain_template_is_no_file():
    assert LLAMA3_PLAIN and digests(TrainConfig(model="testbed", train_file="none", output_dir="o")).keys() == {"model"}
