"""The trainer: every parameter moves, the loss falls, and batching, accumulation and padding change no gradient."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_branches import examples
from transformers import TrainingArguments

from llm2.config import TrainConfig
from llm2.errors import UserError
from llm2.models import load_tokenizer
from llm2.training import VerifierTrainer, train, training_arguments, truncate
from llm2.triplets import Example, Triplet, record_line
from llm2.verifier import ProcessVerifier


def arguments(folder, **changes) -> TrainingArguments:
    defaults = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "remove_unused_columns": False}
    return TrainingArguments(
        **{**defaults, "label_names": ["labels"], "save_strategy": "no", "disable_tqdm": True, **changes}
    )


def gradients(system1_folder, folder, data, per_device: int, accumulation: int) -> dict[str, torch.Tensor]:
    """What one optimizer step of the trainer sees: plain SGD with rate 1 moves each weight by its gradient."""
    torch.manual_seed(0)
    verifier = ProcessVerifier.from_system1(system1_folder, local_files_only=True)
    before = {name: p.detach().clone() for name, p in verifier.named_parameters()}
    trainer = VerifierTrainer(
        verifier,
        arguments(
            folder,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
        ),
        train_dataset=data,
    )
    trainer.train()
    return {name: before[name] - p.detach() for name, p in verifier.named_parameters()}


@pytest.mark.parametrize("per_device, accumulation", [(4, 3), (1, 12), (5, 3)])
def test_accumulation_and_padding_change_no_gradient(system1_folder, tmp_path, per_device, accumulation):
    data = examples(12)
    whole = gradients(system1_folder, tmp_path, data, 12, 1)
    parts = gradients(system1_folder, tmp_path, data, per_device, accumulation)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-5, rtol=0, msg=name)
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-3


def test_gradient_equals_that_of_the_plain_sum_over_pairs(system1_folder, tmp_path):
    """The slow twin: each pair as two whole sequences, without branches, padding or Trainer."""
    data = examples(3)
    found = gradients(system1_folder, tmp_path, data, 3, 1)
    torch.manual_seed(0)
    verifier = ProcessVerifier.from_system1(system1_folder, local_files_only=True)
    losses = []
    for ids, triplets in data:
        for position, gold, negative in triplets:
            scores = [verifier(torch.tensor([[*ids[:position], token]])).scores[0, -1] for token in (gold, negative)]
            losses.append(-torch.nn.functional.logsigmoid(scores[0] - scores[1]))
    torch.stack(losses).mean().backward()
    for name, parameter in verifier.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=0, msg=name)


def test_every_parameter_moves(system1_folder, tmp_path):
    moved = gradients(system1_folder, tmp_path, examples(12), 12, 1)
    assert [name for name, change in moved.items() if change.abs().max() == 0] == []


def write_triplets(path, tokenizer, count: int) -> None:
    """Solutions in which 7 is right and 4 is wrong: enough for a tiny model to learn."""
    seven, four = (tokenizer(digit)["input_ids"][0] for digit in "74")
    lines = []
    for i in range(count):
        messages = [{"role": "user", "content": f"{i} ?"}, {"role": "assistant", "content": "7"}]
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        lines.append(record_line(messages, [Triplet(len(ids) - 2, seven, four)]))
    Path(path).write_text("".join(lines))


@pytest.fixture
def config(system1_folder, tmp_path):
    write_triplets(tmp_path / "triplets.jsonl", load_tokenizer(system1_folder), 40)
    return TrainConfig(
        model=system1_folder,
        train_file=str(tmp_path / "triplets.jsonl"),
        output_dir=str(tmp_path / "verifier"),
        eval_share=0.2,
        epochs=4.0,
        learning_rate=1e-3,
        global_batch_size=8,
        per_device_batch_size=4,
        device="cpu",
    )


def test_train_learns_and_leaves_a_verifier_that_loads(config):
    metrics = train(config)
    assert metrics["eval_pair_accuracy"] == 1.0 and metrics["eval_pairs"] == 8
    assert metrics == json.loads(Path(config.output_dir, "training.json").read_text())
    assert 0 <= metrics["system1_pair_accuracy"] <= 1
    ProcessVerifier.from_pretrained(config.output_dir)


def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(config, tmp_path, monkeypatch):
    whole = train(config)

    class Killed(Exception):
        pass

    def kill(self, *arguments, **options):
        raise Killed

    torn = replace(config, output_dir=str(tmp_path / "torn"))
    monkeypatch.setattr(VerifierTrainer, "_load_best_model", kill)  # after the last checkpoint, before the end
    with pytest.raises(Killed):
        train(torn)
    monkeypatch.undo()
    newest = max(Path(torn.output_dir).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(newest)  # go on from the one before
    again = train(torn)
    assert again["steps"] == whole["steps"]
    assert again["eval_mean_margin"] == pytest.approx(whole["eval_mean_margin"], abs=1e-4)


def test_checkpoints_of_another_config_are_never_gone_on_from(config):
    train(config)
    with pytest.raises(UserError, match="another config: learning_rate was 0.001 and now is 0.002"):
        train(replace(config, learning_rate=2e-3))
    with pytest.raises(UserError, match="holds checkpoints and resume is false"):
        train(replace(config, resume=False))


def test_the_same_seed_trains_the_same_verifier(config, tmp_path):
    once = train(config)
    torch.rand(3)  # whatever was drawn before does not matter
    assert train(replace(config, output_dir=str(tmp_path / "again")))["eval_mean_margin"] == once["eval_mean_margin"]


def test_global_batch_must_divide(config):
    with pytest.raises(UserError, match="global_batch_size 8: expected a multiple of per_device_batch_size 3 x 1"):
        training_arguments(replace(config, per_device_batch_size=3), 40)


def test_truncation_drops_the_pairs_beyond_it_and_counts_them():
    long = Example(list(range(10)), [Triplet(3, 3, 0), Triplet(5, 5, 0)])
    kept, dropped = truncate([long, Example([1, 2, 3, 4, 5, 6], [Triplet(5, 6, 0)])], 5)
    assert kept == [Example([0, 1, 2, 3, 4], [Triplet(3, 3, 0)])] and dropped == 2
