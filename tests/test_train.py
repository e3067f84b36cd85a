"""The trainer: every parameter moves, the loss falls, and batching, accumulation and padding change no gradient."""

import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from conftest import tiny_system1
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_collate import examples, model_inputs
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Gemma2Config, PhiConfig, PhiForCausalLM

from llm2 import LLM2
from llm2.common.config_file import as_dict
from llm2.common.loading import load_config, load_tokenizer
from llm2.common.training import CHECKPOINTING
from llm2.config import TrainConfig, VerifierSpec
from llm2.errors import UserError
from llm2.verifier.arguments import VerifierTrainingArguments, new_verifier
from llm2.verifier.checkpoints import last_whole_checkpoint
from llm2.verifier.collate import verifier_batch
from llm2.verifier.load import load_verifier
from llm2.verifier.loss import pairwise_loss
from llm2.verifier.model import ProcessVerifier
from llm2.verifier.model_card import model_card
from llm2.verifier.train import load_data, train, training_arguments
from llm2.verifier.trainer import PaddedSampler, VerifierTrainer
from llm2.verifier.triplets import Summary, Triplet, record_line

FULL, LORA = VerifierSpec(), VerifierSpec(kind="lora", lora_r=4)
UNEMBEDDING = torch.randn(259 + 2, 32, generator=torch.Generator().manual_seed(3))


def arguments(folder, **changes) -> VerifierTrainingArguments:
    defaults = {"output_dir": str(folder), "report_to": "none", "use_cpu": True}
    return VerifierTrainingArguments(**{**defaults, "save_strategy": "no", "disable_tqdm": True, **changes})


def gradients(
    system1_folder,
    folder,
    data,
    per_device: int,
    accumulation: int,
    loss: dict | None = None,
    spec: VerifierSpec = FULL,
    **changes,
) -> dict[str, torch.Tensor]:
    """Gradients of one optimizer step of the trainer: plain SGD with rate 1 moves each weight by its gradient."""
    torch.manual_seed(0)
    verifier = ProcessVerifier.from_system1(system1_folder, spec, local_files_only=True)
    verifier.set_unembedding(UNEMBEDDING)
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
            **(loss or {}),
            **changes,
        ),
        data,
    )
    trainer.train()
    return {name: before[name] - p.detach() for name, p in verifier.named_parameters()}


@pytest.mark.one_in(3)
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
    for example in data:
        for position, gold, negative in example.triplets:
            scores = [
                verifier(torch.tensor([[*example.ids[:position], token]])).scores[0, -1] for token in (gold, negative)
            ]
            losses.append(-torch.nn.functional.logsigmoid(scores[0] - scores[1]))
    torch.stack(losses).mean().backward()
    for name, parameter in verifier.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=0, msg=name)


def test_the_guided_loss_is_that_of_system1s_margins_and_the_scores(system1_folder, tmp_path):
    """The slow twin: -log sigmoid((z+ - z-) + beta (s+ - s-)) of each pair as two whole sequences, z fixed."""
    data = examples(3)
    system1 = AutoModelForCausalLM.from_pretrained(system1_folder, local_files_only=True)
    loss = dict(guided_beta=0.5, label_smoothing=0.2)
    found = gradients(system1_folder, tmp_path, data, 2, 2, loss)
    torch.manual_seed(0)
    verifier = ProcessVerifier.from_system1(system1_folder, local_files_only=True)
    losses = []
    for example in data:
        for position, gold, negative in example.triplets:
            prefix = example.ids[:position]
            with torch.no_grad():
                logp = system1(torch.tensor([prefix])).logits[0, -1].log_softmax(-1)
            scores = [verifier(torch.tensor([[*prefix, token]])).scores[0, -1] for token in (gold, negative)]
            margin = logp[gold] - logp[negative] + 0.5 * (scores[0] - scores[1])
            losses.append(-0.9 * margin.sigmoid().log() - 0.1 * (-margin).sigmoid().log())
    torch.stack(losses).mean().backward()
    for name, parameter in verifier.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=0, msg=name)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "changes",
    [
        {"guided_beta": 1.0},
        {"guided_beta": 1.0, "kind": "mlp", "token_weight": True, "dropout": 0.1},
        {"best_by": "choice_quality"},
    ],
    ids=["guided", "guided head", "choice quality"],
)
def test_the_checkpoint_is_the_best_by_the_chosen_metric(config, changes):
    config = replace(config, evaluations=4, **changes)
    metrics = train(config)
    name = config.best_by or "guided_pair_loss"
    states = [json.loads(path.read_text()) for path in Path(config.output_dir).glob("checkpoint-*/trainer_state.json")]
    log = max((state["log_history"] for state in states), key=len)
    values = [entry[f"eval_{name}"] for entry in log if f"eval_{name}" in entry]
    assert len(values) >= 4
    best = min(values) if name == "guided_pair_loss" else max(values)
    assert metrics[f"eval_{name}"] == pytest.approx(best, abs=1e-6)
    assert metrics["eval_guided_pair_accuracy_plain"] == metrics["system1_pair_accuracy"]
    assert ProcessVerifier.from_pretrained(config.output_dir).config.beta == metrics["eval_choice_beta"]


def test_dropout_changes_what_is_trained_and_no_score(config, tmp_path):
    plain = train(config)
    dropped = train(replace(config, dropout=0.5, output_dir=str(tmp_path / "dropped")))
    assert dropped["eval_mean_margin"] != plain["eval_mean_margin"]
    verifier = ProcessVerifier.from_pretrained(tmp_path / "dropped")
    assert verifier.dropout.p == 0.0


@pytest.mark.one_in(2)
@pytest.mark.parametrize("loss", [dict(quality_weight=True, margin=0.5), dict(lm_loss_coef=0.5)])
def test_no_loss_depends_on_how_solutions_were_batched(system1_folder, tmp_path, loss):
    data = [
        example._replace(quality_gaps=[(1 + i) / (1 + len(example.triplets)) for i in range(len(example.triplets))])
        for example in examples(10)
    ]
    whole = gradients(system1_folder, tmp_path, data, 10, 1, loss)
    parts = gradients(system1_folder, tmp_path, data, 3, 4, loss)
    plain = gradients(system1_folder, tmp_path, data, 10, 1)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-5, rtol=0, msg=name)
    assert max((whole[name] - plain[name]).abs().max() for name in plain) > 1e-3, "the option does something"


def test_the_lm_loss_is_added_to_the_mean_over_pairs(system1_folder, tmp_path):
    """The slow twin: logits of whole solutions, each token behind the prompt once, beside the gradient of the pairs."""
    data = examples(4)
    found = gradients(system1_folder, tmp_path, data, 4, 1, dict(lm_loss_coef=0.5))
    expected = gradients(system1_folder, tmp_path, data, 4, 1)
    torch.manual_seed(0)
    verifier = ProcessVerifier.from_system1(system1_folder, local_files_only=True)
    losses = []
    for example in data:
        logits = verifier.backbone(torch.tensor([example.ids])).last_hidden_state[0] @ UNEMBEDDING.T
        for position in range(example.start, len(example.ids)):
            losses.append(-logits[position - 1].log_softmax(-1)[example.ids[position]])
    (0.5 * torch.stack(losses).mean()).backward()
    for name, parameter in verifier.backbone.named_parameters():
        both = expected[f"backbone.{name}"] + parameter.grad
        torch.testing.assert_close(found[f"backbone.{name}"], both, atol=1e-5, rtol=0, msg=name)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("spec", [FULL, LORA], ids=["full", "lora"])
def test_gradient_checkpointing_changes_no_gradient(system1_folder, tmp_path, spec):
    data = examples(6)
    expected = gradients(system1_folder, tmp_path, data, 6, 1, spec=spec)
    found = gradients(system1_folder, tmp_path, data, 6, 1, spec=spec, **{CHECKPOINTING: True})
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=0, msg=name)


def test_with_lora_only_the_adapter_and_the_head_move(system1_folder, tmp_path):
    moved = gradients(system1_folder, tmp_path, examples(6), 6, 1, spec=LORA)
    trained = {name for name, change in moved.items() if change.abs().max() > 0}
    assert trained == {name for name in moved if "lora_B" in name or name == "score.weight"}, "A moves once B is not 0"


def test_no_tensor_is_as_wide_as_the_vocabulary(tmp_path):
    """No other size is 333: only the embedding and its gradient may have it."""

    class Widths(TorchDispatchMode):
        found: set[tuple[int, ...]] = set()

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            output = function(*arguments, **(options or {}))
            for tensor in output if isinstance(output, (tuple, list)) else [output]:
                if isinstance(tensor, torch.Tensor) and 333 in tensor.shape:
                    self.found.add(tuple(tensor.shape))
            return output

    tiny_system1(vocab_size=333).save_pretrained(tmp_path)
    verifier = ProcessVerifier.from_system1(str(tmp_path))
    batch = verifier_batch(examples(6))
    with Widths() as widths:
        pairwise_loss(verifier(**model_inputs(batch)).margins, batch.pair_weights).backward()
    assert widths.found == {(333, 32)}


def test_every_example_occurs_once_an_epoch_and_steps_are_full():
    order = PaddedSampler(10, 4, seed=0, num_steps=11)
    first = list(order)
    assert sorted(first) == list(range(12)) == sorted([*first[:10], 10, 11]) and len(order) == 12
    order.set_epoch(1)
    assert list(order) != first and sorted(order) == list(range(12))
    order.set_epoch(3)
    assert len(set(order)) == len(list(order)) == 8, "11 steps in all"
    order.set_epoch(5)
    assert not list(order), "none beyond the last epoch"


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
        lines.append(record_line(messages, [Triplet(len(ids) - 1 - ids[::-1].index(seven), seven, four)]))
    Path(path).write_text("".join(lines))


@pytest.fixture
def config(system1_folder, tmp_path):
    write_triplets(tmp_path / "triplets.jsonl", load_tokenizer(system1_folder), 40)
    return TrainConfig(
        model=system1_folder,
        train_file=str(tmp_path / "triplets.jsonl"),
        output_dir=str(tmp_path / "verifier"),
        eval_share=0.2,
        num_train_epochs=4.0,
        learning_rate=1e-3,
        global_batch_size=8,
        per_device_train_batch_size=4,
        device="cpu",
    )


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind, rank", [("full", None), ("lora", 4)], ids=["full", "lora"])
def test_the_output_is_a_folder_for_the_hub(config, kind, rank):
    """LLM2 loads it with its tokenizer and chat template; the card names data, settings, figures, and no local path."""
    config = replace(config, kind=kind, lora_r=rank, num_train_epochs=1.0)
    metrics = train(config)
    assert LLM2.from_pretrained(config.model, config.output_dir, device="cpu").guidance.verifier is not None
    saved, tokenizer = load_tokenizer(config.output_dir), load_tokenizer(config.model)
    assert saved.get_vocab() == tokenizer.get_vocab() and saved.chat_template == tokenizer.chat_template

    text = Path(config.output_dir, "README.md").read_text()
    _, header, card = text.split("---\n", maxsplit=2)
    tags = ["llm2", "process-verifier", kind]
    assert yaml.safe_load(header) == {"library_name": "llm2", "tags": tags}
    for expected in (
        f"# Verifier of {Path(config.model).name}\n",
        "| `triplets.jsonl` | 40 solutions, 40 triplets (0 duplicates), 0 beyond max_length |",
        "| `learning_rate` | 0.001 |",
        f"(n = 8): verifier {metrics['eval_pair_accuracy']:.1%} [95 % interval {metrics['eval_pair_accuracy_low']:.1%}",
        f"System 1 {metrics['system1_pair_accuracy']:.1%} [95 % interval",
        f"| transformers | {transformers.__version__} |",
    ):
        assert expected in card, expected
    assert ("`lora_r`" in card) == (rank is not None) and "`max_length`" not in card
    assert not any(secret in text for secret in (str(Path(config.model).parent), str(Path.home()), platform.node()))


def test_a_card_names_the_base_model_on_the_hub(config):
    metrics = {"train_solutions": 9, "eval_solutions": 1, "steps": 3, "best_step": 3, "eval_pairs": 2}
    metrics |= {f"{who}_pair_accuracy{end}": 0.5 for who in ("eval", "system1") for end in ("", "_low", "_high")}
    files = {"chat_template": "/home/someone/plain.jinja", "further_files": ("/home/someone/more.jsonl",)}
    hub = replace(config, model="meta-llama/Llama-3.2-1B-Instruct", **files)
    inputs = {"eval_file": {"/home/someone/held_out.jsonl": "0123456789abcdef"}}
    text = model_card(hub, inputs, metrics, [("/home/someone/triplets.jsonl", Summary())])
    assert "| SHA-256 of `held_out.jsonl` (eval_file) | 0123456789ab |" in text
    assert "base_model: meta-llama/Llama-3.2-1B-Instruct" in text and "someone" not in text
    assert "| `chat_template` | plain.jinja |" in text and "| `seed` | 0 |" in text, "the seed is a default"
    assert 'from_pretrained("meta-llama/Llama-3.2-1B-Instruct", "path/to/this/folder")' in text


def test_further_files_are_trained_on_whole_and_their_pairs_are_told_apart(config, tmp_path):
    write_triplets(tmp_path / "second.jsonl", load_tokenizer(config.model), 10)
    two = replace(config, further_files=(str(tmp_path / "second.jsonl"),), limit=30)
    train_set, eval_set, data = load_data(two, load_tokenizer(config.model))
    assert [summary.lines for _, summary in data] == [30, 10] and len(train_set) + len(eval_set) == 40
    assert len({example.first_pair_id for example in [*train_set, *eval_set]}) == 40
    asked, held_out = ({tuple(each.ids[: each.start]) for each in part} for part in (train_set, eval_set))
    assert len(asked) == 24 and len(held_out) == 6 and not asked & held_out, "a problem is on both sides"


def test_train_learns_and_leaves_a_verifier_that_loads(config):
    metrics = train(config)
    assert metrics["eval_pair_accuracy"] == 1.0 and metrics["eval_pairs"] == 8
    assert metrics == json.loads(Path(config.output_dir, "training.json").read_text())
    assert 0 <= metrics["system1_pair_accuracy"] <= 1
    ProcessVerifier.from_pretrained(config.output_dir)


@pytest.mark.parametrize(
    "kind",
    [
        "full",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("lora", "prefix", "prefix_lora", "bilinear", "mlp")),
    ],
)
def test_a_run_goes_on_from_a_trained_verifier(config, tmp_path, kind):
    first = replace(config, kind=kind, num_train_epochs=1.0)
    train(first)
    frozen = {"init_from": first.output_dir, "learning_rate": 1e-12, "output_dir": str(tmp_path / "second")}
    train(replace(first, **frozen))
    trained, again = (
        ProcessVerifier.from_pretrained(name).state_dict() for name in (first.output_dir, frozen["output_dir"])
    )
    new = new_verifier(first.model, arguments(tmp_path, kind=kind), torch.device("cpu")).state_dict()
    for name, weight in trained.items():
        torch.testing.assert_close(again[name], weight, rtol=0, atol=1e-8, msg=name)
    assert any((trained[name] - new[name]).abs().max() > 1e-4 for name in trained)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"kind": "prefix"}, "init_from: expected a verifier as it is to be trained: in .*kind was 'full' and now is"),
        ({"chat_template": "chatml-plain"}, "chat_template: found 'chatml-plain', expected"),
        ({"init_from": "./nowhere"}, "verifier './nowhere': expected a folder with config.json"),
    ],
)
def test_a_verifier_that_does_not_fit_is_refused_before_weights_are_loaded(
    config, tmp_path, monkeypatch, changes, words
):
    train(replace(config, num_train_epochs=0.2))
    monkeypatch.setattr("llm2.verifier.train.measure_system1", kill)
    second = {"init_from": config.output_dir, "output_dir": str(tmp_path / "second")}
    with pytest.raises(UserError, match=words):
        train(replace(config, **second | changes))


def kill(self, *arguments, **options):
    raise InterruptedError


@pytest.mark.long
@pytest.mark.parametrize("kind, rank", [("full", None), ("lora", 4)], ids=["full", "lora"])
def test_a_killed_run_resumes_and_ends_as_an_undisturbed_one(config, tmp_path, monkeypatch, kind, rank):
    config = replace(config, kind=kind, lora_r=rank)
    whole = train(config)

    torn = replace(config, output_dir=str(tmp_path / "torn"))
    monkeypatch.setattr(VerifierTrainer, "_load_best_model", kill)  # after the last checkpoint, before the end
    with pytest.raises(InterruptedError):
        train(torn)
    monkeypatch.undo()
    newest = max(Path(torn.output_dir).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(newest)  # resume from the one before
    again = train(torn)
    assert again["steps"] == whole["steps"]
    assert again["eval_mean_margin"] == pytest.approx(whole["eval_mean_margin"], abs=1e-4)


@pytest.mark.long
def test_a_run_that_stopped_early_is_the_same_after_a_rerun_and_a_resume(config):
    config = replace(config, early_stopping_patience=1, evaluations=40, num_train_epochs=10.0, learning_rate=3e-2)
    folder = Path(config.output_dir)
    whole = train(config)
    assert whole["steps"] < 40

    def outcome(metrics: dict) -> tuple:
        return metrics["steps"], metrics["best_step"], (folder / "model.safetensors").read_bytes()

    expected = outcome(whole)
    assert outcome(train(config)) == expected
    shutil.rmtree(folder / f"checkpoint-{whole['steps']}")
    assert outcome(train(config)) == expected


@pytest.mark.parametrize("kind", ["mlp", "lora"])
def test_a_head_or_an_adapter_goes_on_with_its_own_system1_alone(config, tmp_path, kind):
    train(replace(config, kind=kind, num_train_epochs=0.2))
    other = tiny_system1(seed=5, vocab_size=load_config(config.model).vocab_size)
    shutil.copytree(config.model, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    second = {"model": str(tmp_path / "other"), "init_from": config.output_dir, "output_dir": str(tmp_path / "second")}
    with pytest.raises(UserError, match="found another System 1"):
        train(replace(config, kind=kind, **second))


@pytest.mark.long
@pytest.mark.parametrize("epochs", [1.25, 2.0])
def test_a_run_killed_after_its_last_step_takes_no_further_one(config, tmp_path, monkeypatch, epochs):
    config = replace(config, num_train_epochs=epochs, lr_scheduler_type="constant", evaluations=20)
    whole = train(config)
    torn = replace(config, output_dir=str(tmp_path / "torn"))
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(VerifierTrainer, "_load_best_model", kill)
            train(torn)
    again = train(torn)
    assert again["steps"] == whole["steps"] == math.ceil(epochs * 4)
    assert last_whole_checkpoint(Path(torn.output_dir)).name == f"checkpoint-{whole['steps']}"


def test_the_bar_moves_with_every_forward_and_begins_where_a_resumed_run_does(config, monkeypatch):
    bars = []

    class Bar(tqdm):
        def __init__(self, **options) -> None:
            super().__init__(**options)
            bars.append([self.n])

        def update(self, n: float = 1) -> None:
            super().update(n)
            bars[-1].append(self.n)

    monkeypatch.setattr("llm2.common.training.tqdm", Bar)
    config = replace(config, num_train_epochs=1.0, evaluations=2)
    train(config)  # 32 solutions: 4 steps of two forwards
    assert bars == [list(range(9))]
    shutil.rmtree(Path(config.output_dir, "checkpoint-4"))
    train(config)
    assert bars[1] == [4, 5, 6, 7, 8]


def test_checkpoints_of_another_config_are_not_resumed(config):
    train(config)
    with pytest.raises(UserError, match="another config: learning_rate was 0.001 and now is 0.002"):
        train(replace(config, learning_rate=2e-3))
    with pytest.raises(UserError, match="holds checkpoints and resume is false"):
        train(replace(config, resume=False))


def test_the_same_seed_trains_the_same_verifier(config, tmp_path):
    once = train(config)
    torch.rand(3)  # the state of the global generator does not matter
    assert train(replace(config, output_dir=str(tmp_path / "again")))["eval_mean_margin"] == once["eval_mean_margin"]


def test_global_batch_must_divide(config):
    with pytest.raises(
        UserError, match="global_batch_size 8: expected a multiple of per_device_train_batch_size 3 x 1"
    ):
        training_arguments(replace(config, per_device_train_batch_size=3), 40, torch.device("cpu"), "pair_accuracy")


KILLED_AT_STEP_19 = """
import os, signal, sys
from llm2.__main__ import main
from llm2.verifier.trainer import VerifierTrainer
whole = VerifierTrainer.training_step
def step(trainer, *arguments):
    if trainer.state.global_step == 19:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(trainer, *arguments)
VerifierTrainer.training_step = step
main(["train", sys.argv[1]])
"""


@pytest.mark.slow  # test_a_killed_run_resumes_and_ends_as_an_undisturbed_one is quick
def test_a_run_killed_with_sigkill_ends_with_the_same_loss(config, tmp_path):
    config = replace(config, num_train_epochs=16.0, evaluations=8, logging_steps=1)
    whole = train(config)
    killed = replace(config, output_dir=str(tmp_path / "killed"))
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(as_dict(killed)))
    command = [sys.executable, "-c", KILLED_AT_STEP_19, str(tmp_path / "train.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert finished.returncode == -signal.SIGKILL, finished.stderr[-3000:]
    assert last_whole_checkpoint(Path(killed.output_dir)).name == "checkpoint-16"
    again = train(killed)

    def last_loss(folder: str) -> float:
        history = json.loads((last_whole_checkpoint(Path(folder)) / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry][-1]

    assert again["steps"] == whole["steps"] == 64
    assert last_loss(killed.output_dir) == pytest.approx(last_loss(config.output_dir), abs=1e-6)
    assert again["eval_pair_loss"] == pytest.approx(whole["eval_pair_loss"], abs=1e-6)


def test_an_incomplete_checkpoint_is_not_resumed(tmp_path):
    for step, state in ((5, "{}"), (10, "{}"), (15, '{"half": '), (20, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-10"


def test_patience_ends_a_run_that_gets_no_better(config):
    metrics = train(replace(config, num_train_epochs=10.0, evaluations=20, early_stopping_patience=2))
    assert metrics["eval_pair_accuracy"] == 1.0
    assert metrics["steps"] == metrics["best_step"] + 2 * 2 < 40, "an evaluation every other step"


def test_tensorboard_logs_the_pair_accuracy(config):
    train(replace(config, num_train_epochs=1.0, report_to="tensorboard", logging_steps=1))
    logged = set()
    for events in Path(config.output_dir).glob("runs/*/events*"):
        logged |= set(EventAccumulator(str(events)).Reload().Tags()["scalars"])
    assert {"eval/pair_accuracy", "eval/pair_accuracy_digit", "train/loss", "train/learning_rate"} <= logged


def test_lora_and_bfloat16_learn_too(config):
    metrics = train(replace(config, kind="lora", lora_r=4, bf16=True, gradient_checkpointing=True, lora_dropout=0.1))
    assert metrics["eval_pair_accuracy"] == 1.0
    stored = sum(path.stat().st_size for path in Path(config.output_dir).glob("*.safetensors"))
    assert stored < 50_000 < Path(config.model, "model.safetensors").stat().st_size
    assert ProcessVerifier.from_pretrained(config.output_dir).config.base_model == config.model


def test_quality_weights_need_the_quality_key(config):
    with pytest.raises(UserError, match="line 1: key 'quality'"):
        train(replace(config, quality_weight=True))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(config):
    tokenizer = load_tokenizer(config.model)
    tokenizer.add_tokens(["<more>", "<and more>"])
    folder = Path(config.output_dir, "system1")
    shutil.copytree(config.model, folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=f"has {len(tokenizer)} tokens and the model embeds {len(tokenizer) - 2}"):
        train(replace(config, model=str(folder)))
    resized = AutoModelForCausalLM.from_pretrained(folder)
    resized.resize_token_embeddings(len(tokenizer))
    resized.save_pretrained(folder)
    train(replace(config, model=str(folder), num_train_epochs=1.0))
    load_verifier(config.output_dir, torch.device("cpu"), "auto", vocabulary=len(tokenizer))


def test_one_process_that_sees_several_gpus_is_refused(config, monkeypatch):
    """The Trainer would wrap the model in DataParallel, and multiply the batch in silence."""
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 4)
    with pytest.raises(UserError, match="one process sees 4 GPUs.*expected one process for each"):
        train(config)


def test_each_process_loads_system1_onto_its_own_gpu(config, monkeypatch):
    class Loaded(Exception):
        pass

    def load_system1(name, device):
        raise Loaded(device)

    monkeypatch.setattr("llm2.verifier.train.resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("llm2.verifier.system1.load_system1", load_system1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(Loaded, match="cuda:3"):
        train(config)


def test_flex_attention_without_a_gpu_is_refused(config):
    with pytest.raises(UserError, match="expected a CUDA GPU"):
        train(replace(config, attn_implementation="flex_attention"))


def test_a_language_model_loss_on_logits_that_are_capped_is_refused_before_weights_are_loaded(config, tmp_path):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"vocab_size": len(load_tokenizer(config.model)), "intermediate_size": 16, "num_hidden_layers": 1}
    Gemma2Config(**sizes).save_pretrained(tmp_path / "capped")
    load_tokenizer(config.model).save_pretrained(tmp_path / "capped")
    with pytest.raises(UserError, match="lm_loss_coef: .* has final_logit_softcapping, which changes the loss"):
        train(replace(config, model=str(tmp_path / "capped"), lm_loss_coef=1.0, attn_implementation="eager"))


def test_soft_targets_train_and_choose_checkpoint_and_beta_by_what_guidance_would_choose(config, tmp_path):
    """The verdicts of an exploration: at each fork one token that is worse, one that is as good as gold."""
    lines = []
    for line in Path(config.train_file).read_text().splitlines():
        record = json.loads(line)
        ((position, gold, negative),) = record["samples"]
        outcomes = [(negative, [0, 8]), (negative + 1, [10, 10])]
        pairs = [{"triplet": [position, gold, token], "gold": [10, 10], "token": counts} for token, counts in outcomes]
        lines.append(json.dumps({"messages": record["messages"], "pairs": pairs}))
    (tmp_path / "verdicts.jsonl").write_text("\n".join(lines) + "\n")
    metrics = train(replace(config, train_file=str(tmp_path / "verdicts.jsonl")))
    assert metrics["eval_pair_accuracy"] == 1.0 and metrics["eval_pairs"] == metrics["eval_forks"] == 8
    assert (
        metrics["eval_choice_quality"] >= metrics["eval_choice_quality_plain"] and metrics["eval_choice_quality"] == 0
    )
    assert metrics["eval_choice_beta"] > 0
    state = json.loads(next(Path(config.output_dir).glob("checkpoint-*/trainer_state.json")).read_text())
    assert state["best_metric"] == pytest.approx(metrics["eval_choice_quality"])
    assert "beta that chooses the best tokens" in Path(config.output_dir, "README.md").read_text()


def test_a_warm_up_of_the_whole_run_is_not_one_step(config):
    arguments = training_arguments(replace(config, warmup_ratio=1.0), 40, torch.device("cpu"), "pair_accuracy")
    assert arguments.get_warmup_steps(100) == 100


def test_a_run_resumes_whose_files_are_named_in_any_characters(config, tmp_path):
    odd = replace(config, train_file=str(tmp_path / "\U0001f642 \u2028.jsonl"), num_train_epochs=1.0)
    shutil.copy(config.train_file, odd.train_file)
    assert train(odd)["steps"] == train(odd)["steps"]


def test_a_folder_holds_nothing_of_an_earlier_verifier_of_another_kind(config):
    train(replace(config, kind="lora", lora_r=4, num_train_epochs=1.0))
    for checkpoint in Path(config.output_dir).glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    train(replace(config, num_train_epochs=1.0))
    verifier = LLM2.from_pretrained(config.model, config.output_dir, device="cpu").guidance.verifier
    assert verifier.config.kind == "full" and not [*Path(config.output_dir).glob("adapter*")]


def test_held_out_problems_that_are_trained_on_are_counted(config, tmp_path, caplog):
    lines = Path(config.train_file).read_text().splitlines(keepends=True)
    (tmp_path / "eval.jsonl").write_text("".join(lines[:3]))
    (tmp_path / "train.jsonl").write_text("".join(lines[2:]))
    files = {"train_file": str(tmp_path / "train.jsonl"), "eval_file": str(tmp_path / "eval.jsonl")}
    load_data(replace(config, **files), load_tokenizer(config.model))
    assert "eval.jsonl: the problems of 1 of 3 solutions are trained on too" in caplog.text
    caplog.clear()
    (tmp_path / "train.jsonl").write_text("".join(lines[3:]))
    load_data(replace(config, **files), load_tokenizer(config.model))
    assert not caplog.text


def test_a_language_model_loss_without_the_output_layers_bias_is_refused(config, tmp_path):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
    model = PhiForCausalLM(PhiConfig(vocab_size=len(load_tokenizer(config.model)), **sizes))
    model.save_pretrained(tmp_path / "phi")
    load_tokenizer(config.model).save_pretrained(tmp_path / "phi")
    with pytest.raises(
        UserError, match="lm_loss_coef: the output layer of .*phi has a bias, which the loss leaves out"
    ):
        train(replace(config, model=str(tmp_path / "phi"), lm_loss_coef=1.0))


@pytest.mark.parametrize("folder", ["system1", "../{}/system1/."])
def test_a_verifier_does_not_replace_its_system1(config, tmp_path, folder):
    shutil.copytree(config.model, tmp_path / "system1")
    output = str(tmp_path / folder.format(tmp_path.name))
    with pytest.raises(UserError, match="output_dir: found .*, the folder of System 1; expected another one"):
        train(replace(config, model=str(tmp_path / "system1"), output_dir=output, kind="lora"))


@pytest.mark.parametrize("kind", ["full", "lora", "prefix_lora", "mlp"])
def test_mixed_precision_trains_in_float32_on_frozen_weights_in_bfloat16(config, tmp_path, kind):
    config = replace(config, kind=kind, bf16=True, num_train_epochs=1.0)
    verifier = new_verifier(config.model, arguments(tmp_path, kind=kind, bf16=True), torch.device("cpu"))
    trained = {weight.dtype for weight in verifier.parameters() if weight.requires_grad}
    frozen = {weight.dtype for weight in verifier.parameters() if not weight.requires_grad}
    assert trained == {torch.float32} and frozen == (set() if kind == "full" else {torch.bfloat16})
    scores = verifier(torch.tensor([[5, 6, 7, 8]])).scores  # outside of autocast
    twin = new_verifier(config.model, arguments(tmp_path, kind=kind), torch.device("cpu"))
    twin.load_state_dict(verifier.state_dict())
    torch.testing.assert_close(scores.float(), twin(torch.tensor([[5, 6, 7, 8]])).scores, atol=0.05, rtol=0.05)
    train(config)
    kept = next(Path(config.output_dir).glob("*model.safetensors"))
    assert {weight.dtype for weight in load_file(kept).values()} == {torch.float32}
    assert ProcessVerifier.from_pretrained(config.output_dir).dtype == torch.float32
    train(replace(config, init_from=config.output_dir, output_dir=str(tmp_path / "second")))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"kind": "lora", "lora_target_modules": ("q_proj", "v_prj")}, "lora_target_modules: found 'v_prj', which is"),
        ({"kind": "lora", "lora_target_modules": ("proj",)}, "LoRA targets"),
        ({"kind": "prefix", "trainable_layers": 0}, "trainable_layers: found 0, expected at least 1"),
    ],
)
def test_what_names_no_weight_to_train_is_refused(tmp_path, changes, words):
    tiny_system1(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    with pytest.raises(UserError, match=words):
        new_verifier(str(tmp_path / "tied"), arguments(tmp_path, **changes), torch.device("cpu"))


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "lora", "lora_target_modules": ("q_proj", "self_attn.v_proj")},
        {"kind": "prefix", "trainable_layers": 0, "token_weight": True},
    ],
)
def test_what_names_some_weight_is_trained(tmp_path, changes):
    tiny_system1(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    verifier = new_verifier(str(tmp_path / "tied"), arguments(tmp_path, **changes), torch.device("cpu"))
    trained = {
        name.split(".")[-4] for name, weight in verifier.named_parameters() if weight.requires_grad and "lora" in name
    }
    assert trained == ({"q_proj", "v_proj"} if changes["kind"] == "lora" else set())
