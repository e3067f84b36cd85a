"""VerifierTrainer from Python: rows of a dataset give the losses of the same file, and are checked as its lines are."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from test_train import arguments, config, write_triplets  # noqa: F401 (a fixture)
from transformers import TrainerCallback

from llm2 import LLM2, UserError, VerifierTrainer
from llm2.common.chat import CHATML_PLAIN
from llm2.common.loading import load_tokenizer
from llm2.config import TrainConfig
from llm2.verifier.arguments import OWN
from llm2.verifier.load import require_same_template
from llm2.verifier.model import ProcessVerifier
from llm2.verifier.train import train
from llm2.verifier.triplets import load_examples


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "changes", [{}, {"guided_beta": 1.0, "kind": "lora", "lora_r": 4}, {"kind": "bilinear"}, {"margin": 0.5}]
)
def test_a_dataset_and_a_name_train_as_the_command_does(config, tmp_path, changes):  # noqa: F811
    """Equal held-out metrics: the same verifier is drawn, and sees the same batches."""
    write_triplets(tmp_path / "eval.jsonl", load_tokenizer(config.model), 9)
    config = replace(config, eval_file=str(tmp_path / "eval.jsonl"), num_train_epochs=1.0, evaluations=1, **changes)
    expected = train(config)
    args = arguments(
        tmp_path / "python",
        num_train_epochs=1,
        learning_rate=config.learning_rate,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        seed=config.seed,
        data_seed=config.seed,
        **changes,
    )
    steps = []

    class Counts(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            steps.append(state.global_step)

    data = {
        "train_dataset": Dataset.from_list(rows(tmp_path / "triplets.jsonl")),
        "eval_dataset": rows(tmp_path / "eval.jsonl"),
    }
    trainer = VerifierTrainer(model=config.model, args=args, **data, callbacks=[Counts()])
    trainer.train()
    found = trainer.evaluate()
    assert steps == [1, 2, 3, 4, 5]
    for key in ("eval_pair_loss", "eval_pair_accuracy", "eval_mean_margin", "eval_guided_pair_loss"):
        assert found[key] == pytest.approx(expected[key], abs=1e-6), key
    trainer.save_model()
    assert LLM2.from_pretrained(config.model, args.output_dir, device="cpu").score("1 ?", ["7"])


def test_a_verifier_is_saved_with_the_template_that_it_was_trained_with(config, tmp_path):  # noqa: F811
    writer, tokenizer = load_tokenizer(config.model), load_tokenizer(config.model)
    writer.chat_template = CHATML_PLAIN
    write_triplets(tmp_path / "plain.jsonl", writer, 9)
    args = arguments(tmp_path / "python", chat_template="chatml-plain", kind="bilinear", max_steps=1)
    own = tokenizer.chat_template
    trainer = VerifierTrainer(config.model, args, rows(tmp_path / "plain.jsonl"), processing_class=tokenizer)
    trainer.save_model()
    assert tokenizer.chat_template == own != CHATML_PLAIN
    require_same_template(args.output_dir, config.model, "chatml-plain")
    with pytest.raises(UserError, match="chat_template: found None, expected 'chatml-plain'"):
        require_same_template(args.output_dir, config.model, None)


def test_the_arguments_have_the_defaults_of_the_command(tmp_path):
    args, defaults = arguments(tmp_path), TrainConfig(model="m", train_file="f", output_dir="o")
    assert {name: getattr(args, name) for name in OWN} == {name: getattr(defaults, name) for name in OWN}
    assert {"chat_template", "max_length", "kind", "lora_r", "guided_beta", "attn_implementation"} <= set(OWN)


@pytest.mark.parametrize(
    "key, value",
    [("kind", "prefixes"), ("lora_r", 0), ("margin", -1.0), ("max_length", "8"), ("label_smoothing_factor", 0.1)],
)
def test_arguments_refuse_what_the_command_refuses(tmp_path, key, value):
    with pytest.raises(UserError, match=f"^{key}: .*found {value!r}"):
        arguments(tmp_path, **{key: value})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"samples": [[3, 1]]}, "train_dataset, row 2: key 'samples': expected [position, gold_token_id"),
        ({"samples": [[1, 5, 6]]}, "row 2, position 1: expected token 5"),
        ({"completions": ["a"], "labels": [True]}, "row 2: expected messages and samples, found completions"),
        ({"messages": None}, "train_dataset, row 2: expected the key 'messages' with a list"),
    ],
)
def test_a_row_that_does_not_fit_is_named_before_weights_load(  # noqa: F811
    config,  # noqa: F811
    tmp_path,
    monkeypatch,
    change,
    message,
):
    monkeypatch.setattr(ProcessVerifier, "from_system1", None)
    data = rows(tmp_path / "triplets.jsonl")
    data[1] |= change
    with pytest.raises(UserError) as refused:
        VerifierTrainer(config.model, arguments(tmp_path / "out"), data)
    assert message in str(refused.value)


def test_a_generator_trains_on_every_row_and_no_row_is_refused(config, tmp_path):  # noqa: F811
    data = rows(tmp_path / "triplets.jsonl")
    trainer = VerifierTrainer(config.model, arguments(tmp_path / "out"), (row for row in data))
    assert [example.line for example in trainer.train_dataset.examples] == list(range(1, len(data) + 1))
    for none in ([], iter([])):
        with pytest.raises(UserError, match="train_dataset: expected at least one row, found none"):
            VerifierTrainer(config.model, arguments(tmp_path / "out"), none)


def test_verdicts_of_an_exploration_are_rows_too(config, tmp_path):  # noqa: F811
    ((position, gold, negative),) = rows(tmp_path / "triplets.jsonl")[0]["samples"]
    pairs = [{"triplet": [position, gold, negative], "gold": [5, 10], "token": [1, 8]}]
    data = [{"messages": row["messages"], "pairs": pairs} for row in rows(tmp_path / "triplets.jsonl")[:3]]
    (tmp_path / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    expected, _ = load_examples(tmp_path / "verdicts.jsonl", load_tokenizer(config.model))
    trainer = VerifierTrainer(config.model, arguments(tmp_path / "out"), Dataset.from_list(data))
    assert [*trainer.train_dataset.examples] == [*expected] and 0.5 < expected[0].gold_better[0] < 1


def test_max_steps_may_exceed_the_default_epochs_and_data_seed_orders_the_rows(config, tmp_path):  # noqa: F811
    data = rows(tmp_path / "triplets.jsonl")  # 5 steps an epoch
    args = arguments(tmp_path / "out", kind="bilinear", max_steps=17, per_device_train_batch_size=8)
    trainer = VerifierTrainer(config.model, args, data)
    trainer.train()
    assert trainer.state.global_step == 17
    order = list(trainer._get_train_sampler())
    args.data_seed = 5
    assert list(trainer._get_train_sampler()) != order


def test_other_pairs_than_those_held_out_are_not_evaluated(config, tmp_path):  # noqa: F811
    """Groups and System 1's margins are found by a pair's number, which other files have too."""
    data, tokenizer = rows(tmp_path / "triplets.jsonl"), load_tokenizer(config.model)
    trainer = VerifierTrainer(config.model, arguments(tmp_path / "out"), data[:9], data[9:12])
    assert trainer.evaluate()["eval_pairs"] == trainer.evaluate(trainer.eval_dataset)["eval_pairs"] == 3
    examples, _ = load_examples(tmp_path / "triplets.jsonl", tokenizer)
    for other in (data, examples):
        for evaluate in (trainer.evaluate, trainer.predict):
            with pytest.raises(UserError, match="eval_dataset: expected none here"):
                evaluate(other)


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
def test_examples_of_two_files_that_are_numbered_alike_are_refused(config, tmp_path, which):  # noqa: F811
    examples = [*load_examples(tmp_path / "triplets.jsonl", load_tokenizer(config.model))[0]]
    data = {"train_dataset": examples, "eval_dataset": examples, which: [*examples, *examples]}
    with pytest.raises(UserError, match="the pair 0 stands twice"):
        VerifierTrainer(config.model, arguments(tmp_path / "out", guided_beta=1.0), **data)


def test_a_verifier_whose_system1_is_in_the_home_folder_trains_on_its_margins(  # noqa: F811
    config,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    monkeypatch.setenv("HOME", str(Path(config.model).parent))
    verifier = ProcessVerifier.from_system1(config.model)
    assert verifier.config.base_model.startswith("~/")
    data, tokenizer = rows(tmp_path / "triplets.jsonl"), load_tokenizer(config.model)
    VerifierTrainer(verifier, arguments(tmp_path / "out", guided_beta=1.0), data, processing_class=tokenizer)
