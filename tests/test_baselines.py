"""The rivals of a verifier: fine-tuning, token preference, outcome scores, self-consistency."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_system1
from test_train import write_triplets
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    MptConfig,
    TrainingArguments,
)

from experiments.baselines.config import FinetuneConfig, OutcomeConfig, PreferConfig, SelfConsistencyConfig
from experiments.baselines.finetune import collator, examples, finetune
from experiments.baselines.outcome import as_verifier, outcome_pairs, padding_with_no_text, train_outcome
from experiments.baselines.prefer import PreferenceTrainer, prefer, preference_batch
from experiments.baselines.self_consistency import compare, votes
from experiments.study.results import read_problems
from llm2.common.loading import load_system1, load_tokenizer
from llm2.common.training import CHECKPOINTING, ForwardsBar
from llm2.errors import UserError
from llm2.exploration.own_solutions import Sample
from llm2.exploration.solutions import tokenize_solutions
from llm2.tasks import Problem, load_task
from llm2.tasks.grading import Grade
from llm2.verifier.load import load_verifier
from llm2.verifier.loss import IGNORE_INDEX
from llm2.verifier.pair_metrics import system1_margins
from llm2.verifier.scoring import score_tokens
from llm2.verifier.triplets import Example, Triplet, load_examples

CPU = torch.device("cpu")
TRAINING = {
    "num_train_epochs": 4.0,
    "learning_rate": 3e-3,
    "global_batch_size": 4,
    "per_device_train_batch_size": 2,
    "device": "cpu",
}


def has_vowel(text: str, gold: str) -> bool:
    """A grader that about half of a random model's solutions pass."""
    return any(vowel in text for vowel in "aeiouAEIOU")


@pytest.fixture
def finetune_config(system1_folder, tmp_path) -> FinetuneConfig:
    return FinetuneConfig(
        model=system1_folder,
        output_dir=str(tmp_path / "finetuned"),
        task="testbed",
        limit=8,
        max_new_tokens=8,
        **TRAINING,
    )


def gold_loss(folder: str, problems: list[Problem]) -> float:
    """Mean -log p of the solutions' tokens."""
    model, tokenizer = load_system1(folder, CPU), load_tokenizer(folder)
    total = count = 0
    for solution in tokenize_solutions(load_task("testbed"), problems, tokenizer, None, [tokenizer.eos_token_id]):
        ids = torch.tensor(solution.ids)
        with torch.inference_mode():
            logprobs = model(ids[None]).logits[0].log_softmax(-1)
        for position in range(solution.start, solution.end):
            total -= logprobs[position - 1, ids[position]].item()
            count += 1
    return total / count


def test_fine_tuning_makes_gold_solutions_likelier_and_the_result_is_a_system1(finetune_config):
    counts = finetune(finetune_config)
    problems = load_task("testbed").problems("train", 8)
    assert counts == json.loads(Path(finetune_config.output_dir, "training.json").read_text())
    assert counts["solutions"] == 8
    before, after = (gold_loss(name, problems) for name in (finetune_config.model, finetune_config.output_dir))
    assert after < before - 0.3
    with pytest.raises(UserError, match="holds a model already"):
        finetune(finetune_config)


@pytest.mark.parametrize("changes, last", [({}, 8), ({"output_rank": 2, "num_train_epochs": 3.5}, 7)])
def test_a_killed_run_goes_on_from_its_checkpoint_to_equal_weights(finetune_config, monkeypatch, changes, last):
    config, expected = (
        replace(finetune_config, output_dir=finetune_config.output_dir + name, **changes) for name in ("1", "2")
    )
    counts = finetune(expected)
    steps = []

    def step(bar, args, state, control, **others) -> None:
        steps.append(state.global_step)
        if len(steps) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(ForwardsBar, "on_step_end", step)
    with pytest.raises(KeyboardInterrupt):
        finetune(config)
    with pytest.raises(UserError, match="learning_rate"):
        finetune(replace(config, learning_rate=1.0))
    assert finetune(config) == counts
    assert steps == [1, 2, 3, 4, 5, 6, *range(6, last + 1)]
    found = load_system1(config.output_dir, CPU).state_dict()
    for name, weight in load_system1(expected.output_dir, CPU).state_dict().items():
        assert torch.equal(found[name], weight), name
    assert not Path(config.output_dir, "checkpoints").exists()


def test_solutions_of_another_task_are_mixed_in(finetune_config):
    counts = finetune(replace(finetune_config, replay_task="experiments.testbed.regimes:Sorting", num_train_epochs=0.1))
    assert counts["solutions"] == 16


def test_an_unknown_task_to_replay_is_refused_before_solutions_are_sampled(finetune_config):
    with pytest.raises(UserError, match="key 'replay_task': found 'sortign'"):
        finetune(replace(finetune_config, replay_task="sortign", solutions="own"))
    assert not Path(finetune_config.output_dir, "solutions").exists()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("tied", [True, False])
def test_a_low_rank_edit_changes_the_output_layer_alone(finetune_config, tmp_path, tied):
    system1 = load_system1(finetune_config.model, CPU)
    if tied:
        system1.lm_head.weight = system1.model.embed_tokens.weight
    system1.config.tie_word_embeddings = tied
    system1.save_pretrained(tmp_path / "system1")
    load_tokenizer(finetune_config.model).save_pretrained(tmp_path / "system1")
    finetune(replace(finetune_config, model=str(tmp_path / "system1"), output_rank=2, learning_rate=3e-2))
    before, after = (
        load_system1(str(folder), CPU).state_dict() for folder in (tmp_path / "system1", finetune_config.output_dir)
    )
    changed = {name: after[name] - before[name] for name in after if not torch.equal(after[name], before[name])}
    assert list(changed) == ["lm_head.weight"]
    assert torch.linalg.matrix_rank(changed["lm_head.weight"], rtol=1e-4) == 2


def test_the_loss_of_fine_tuning_is_on_the_solution_and_its_end(finetune_config):
    tokenizer, task = load_tokenizer(finetune_config.model), load_task("testbed")
    solutions = tokenize_solutions(task, task.problems("train", 2), tokenizer, None, [tokenizer.eos_token_id])
    for example, problem in zip(examples(solutions), task.problems("train", 2), strict=True):
        labels = [label for label in example["labels"] if label != IGNORE_INDEX]
        assert tokenizer.decode(labels) == problem.solution + tokenizer.eos_token
        assert len(example["labels"]) == len(example["input_ids"])


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=12, bos_token_id=1, eos_token_id=1),
        MptConfig(vocab_size=50, d_model=16, n_layers=2, n_heads=2, max_seq_len=12),
    ],
    ids=lambda config: config.model_type,
)
def test_a_batch_of_fine_tuning_has_the_loss_of_its_solutions_one_by_one(config):
    """Padding, positions that are learned or absent, and the positions whose logits are left out change nothing."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    lengths = ((2, 5), (7, 3), (1, 1))  # of prompts and solutions
    rows, losses = [], []
    for prompt, solution in lengths:
        ids = torch.randint(50, (prompt + solution,))
        rows.append({"input_ids": ids.tolist(), "labels": [IGNORE_INDEX] * prompt + ids[prompt:].tolist()})
        logits = model(ids[None]).logits[0, prompt - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[prompt:], reduction="sum"))
    batch = collator(model)(rows)
    output = model(**batch)
    assert output.logits.shape == (3, 6, 50)
    assert output.loss.item() == pytest.approx(sum(losses).item() / 9, rel=1e-5)


def test_rejection_sampling_trains_on_own_right_solutions_only(finetune_config, monkeypatch):
    trained_on = []
    monkeypatch.setattr("experiments.baselines.finetune.examples", lambda s: trained_on.extend(s) or examples(s))
    own = {"solutions": "own", "solution_samples": 6, "max_solutions": 2, "grader": "test_baselines:has_vowel"}
    counts = finetune(replace(finetune_config, **own))
    assert counts["sampled_problems"] == 8 and counts["solutions"] == len(trained_on) > counts["solved_problems"] > 0
    assert all(has_vowel(solution.problem.solution, "") for solution in trained_on)
    assert len({solution.problem.question for solution in trained_on}) == counts["solved_problems"]


def test_answers_alone_are_refused_for_fine_tuning_on_gold(finetune_config):
    with pytest.raises(UserError, match="train-0 has no gold solution; expected one, or solutions=own"):
        finetune(replace(finetune_config, task="experiments.testbed.regimes:Answers"))


# --- Token preference ---

PAIRS = [
    Example([0, 5, 6, 7, 8], [Triplet(3, 7, 20), Triplet(4, 8, 21)], first_pair_id=0),
    Example([0, 9, 10], [Triplet(2, 10, 22)], first_pair_id=2),
]


def test_a_batch_of_preferences_names_row_position_gold_and_negative():
    batch = preference_batch(PAIRS, {0: 0.5, 1: -1.0, 2: 2.0})
    assert batch["input_ids"].tolist() == [[0, 5, 6, 7, 8], [0, 9, 10, 0, 0]]
    assert batch["pairs"].tolist() == [[0, 3, 7, 20], [0, 4, 8, 21], [1, 2, 10, 22]]
    assert batch["reference"].tolist() == [0.5, -1.0, 2.0] and batch["targets"].tolist() == [1.0] * 3
    soft = preference_batch([PAIRS[0]._replace(gold_better=[0.25, 0.5]), PAIRS[1]], {0: 0.5, 1: -1.0, 2: 2.0})
    assert soft["targets"].tolist() == [0.25, 0.5, 1.0]


def preference_trainer(model, folder, **changes) -> PreferenceTrainer:
    options = {"output_dir": str(folder), "remove_unused_columns": False, "report_to": "none", "use_cpu": True}
    return PreferenceTrainer(model, TrainingArguments(**options | changes), PAIRS, beta=0.3)


def test_the_loss_is_dpos_with_answers_of_one_token(system1, tmp_path):
    """-log sigmoid(b (log p/p_ref of gold - log p/p_ref of the negative)), each prefix in a forward of its own."""
    trainer = preference_trainer(system1, tmp_path)
    policy = tiny_system1(3)
    losses = []
    for ids, triplets, *_ in PAIRS:
        for position, gold, negative in triplets:
            with torch.inference_mode():
                p, reference = (m(torch.tensor([ids[:position]])).logits[0, -1].softmax(-1) for m in (policy, system1))
            ratio = torch.log(p[gold] / reference[gold]) - torch.log(p[negative] / reference[negative])
            losses.append(math.log1p(math.exp(-0.3 * ratio.item())))
    loss = trainer.compute_loss(policy, trainer.collate(PAIRS), num_items_in_batch=torch.tensor(3))
    assert loss.item() == pytest.approx(sum(losses) / 3, abs=1e-5)


def test_a_step_of_preferences_does_not_depend_on_its_batches(tmp_path):
    trained = []
    for size, steps in ((2, 1), (1, 2)):
        model = tiny_system1()
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        preference_trainer(model, tmp_path, max_steps=1, optim="sgd", learning_rate=0.1, **sizes).train()
        trained.append(model)
    for name, weight in trained[0].state_dict().items():
        torch.testing.assert_close(trained[1].state_dict()[name], weight, msg=name)


def test_preference_training_prefers_gold_and_writes_a_system1(system1_folder, tmp_path):
    path, tokenizer = tmp_path / "triplets.jsonl", load_tokenizer(system1_folder)
    write_triplets(path, tokenizer, 6)
    output = str(tmp_path / "preferred")
    counts = prefer(PreferConfig(model=system1_folder, train_file=str(path), output_dir=output, **TRAINING))
    pairs, _ = load_examples(path, tokenizer)
    before, after = (system1_margins(load_system1(name, CPU), pairs) for name in (system1_folder, output))
    assert counts["triplets"] == len(before)
    assert all(after[pair] > before[pair] for pair in before)


# --- Outcome scores ---


def sample(text: str, correct: bool) -> Sample:
    return Sample(text, Grade(text, correct, correct), 1)


def test_outcome_pairs_are_distinct_right_and_wrong_solutions():
    config = OutcomeConfig(model="m", task="testbed", output_dir="o", max_pairs=3)
    samples = [sample("a", True), sample("a", True), sample("b", True), sample("c", False), sample("d", False)]
    problem = Problem("train-0", "?", "1")
    pairs = [(right.solution, wrong.solution) for right, wrong in outcome_pairs(problem, samples, config)]
    assert len(pairs) == 3 and set(pairs) < {("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")}
    assert outcome_pairs(problem, samples[:3], config) == []


def test_a_classifier_as_a_verifier_gives_the_last_token_its_score(system1_folder):
    model = AutoModelForSequenceClassification.from_pretrained(system1_folder, num_labels=1).eval()
    verifier = as_verifier(model, system1_folder).eval()
    prompts, solutions = [[3, 4], [5]], [[6, 7, 8], [9, 10]]
    scores = score_tokens(verifier, prompts, solutions)
    for prompt, solution, tokens in zip(prompts, solutions, scores, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([prompt + solution])).logits.item()
        assert tokens[-1] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("pad", ["eos_token", "pad_token"])
def test_a_classifier_reads_the_score_of_the_token_that_ends_a_solution(system1_folder, pad, tmp_path):
    """Also where that is the pad token, as in SmolLM2."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer = load_tokenizer(system1_folder)
    tokenizer.pad_token = getattr(tokenizer, pad)
    end = tokenizer.eos_token_id
    rows = [
        {"chosen_ids": [5, 6, 7, end], "rejected_ids": [5, 6, end]},
        {"chosen_ids": [9, end], "rejected_ids": [8] * 6},
    ]
    model = AutoModelForSequenceClassification.from_pretrained(system1_folder, num_labels=1).eval()
    options = {"report_to": "none", "use_cpu": True, "bf16": False, "max_length": None, CHECKPOINTING: False}
    trainer = trl.RewardTrainer(
        model,
        trl.RewardConfig(output_dir=str(tmp_path), **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=padding_with_no_text(tokenizer, rows),
    )
    batch = trainer.data_collator(rows)
    texts = [row[key] for key in ("chosen_ids", "rejected_ids") for row in rows]
    expected = score_tokens(
        as_verifier(model, system1_folder).eval(), [ids[:1] for ids in texts], [t[1:] for t in texts]
    )
    with torch.inference_mode():
        found = model.cpu()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    torch.testing.assert_close(found, torch.tensor([scores[-1] for scores in expected]), atol=1e-5, rtol=0)
    assert tokenizer.pad_token == getattr(tokenizer, pad), "the tokenizer that is saved is as it was"


def test_without_trl_the_requirements_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match=r"this needs TRL .* expected the packages of requirements.txt"):
        train_outcome(OutcomeConfig(model="m", task="testbed", output_dir="o"))


def test_an_outcome_verifier_is_trained_and_loads_as_any_verifier(system1_folder, tmp_path):
    config = OutcomeConfig(
        model=system1_folder,
        output_dir=str(tmp_path / "outcome"),
        task="testbed",
        grader="test_baselines:has_vowel",
        limit=6,
        max_new_tokens=8,
        solution_samples=6,
        **TRAINING,
    )
    counts = train_outcome(config)
    assert counts["pairs"] > 6 and counts["sampled_tokens"] > 36
    verifier = load_verifier(config.output_dir, CPU, "auto", vocabulary=1)
    backbone = load_system1(system1_folder, CPU).base_model.state_dict()
    changed = [name for name, weight in verifier.backbone.state_dict().items() if not weight.equal(backbone[name])]
    assert len(changed) == len(backbone)


# --- Self-consistency ---


def write_predictions(folder, mode: str, *problems: list[tuple[str, bool, int]]) -> str:
    """Each problem is a list of (answer, correct, tokens)."""
    folder.mkdir()
    with (folder / "predictions.jsonl").open("w") as file:
        for index, samples in enumerate(problems):
            keys = [dict(zip(("answer", "correct", "tokens"), each, strict=True)) for each in samples]
            file.write(json.dumps({"id": str(index), "mode": mode, "samples": keys}) + "\n")
    return str(folder)


def test_self_consistency_votes_with_as_many_samples_as_the_other_modes_tokens_pay_for(tmp_path):
    right, wrong = ("1", True, 10), ("2", False, 10)
    samples = write_predictions(
        tmp_path / "a", "plain_sampling", [right, right, wrong, wrong], [right, wrong, wrong, wrong]
    )
    greedy = write_predictions(tmp_path / "b", "guided_greedy", [("1", True, 40)], [("1", True, 24)])
    output = tmp_path / "c" / "result.json"
    result = compare(SelfConsistencyConfig(samples=samples, against=greedy, output=str(output)))
    assert json.loads(json.dumps(result)) == json.loads(output.read_text())
    ours, other = result["self_consistency"], result["against"]
    assert (ours["majority_at"], ours["tokens_per_problem"], other["tokens_per_problem"]) == (3, 30, 32)
    # three of two right and two wrong votes: right wins half of the subsets; of one and three: none
    assert (ours["accuracy"], other["accuracy"], result["n"]) == (0.25, 1.0, 2)
    assert result["paired"]["difference"] == 0.75


def test_refused_samples_have_no_vote_in_self_consistency(tmp_path):
    write_predictions(tmp_path / "a", "plain_sampling", [("1", True, 10), ("2", False, 10), ("2", False, 10)])
    path = tmp_path / "a" / "predictions.jsonl"
    line = json.loads(path.read_text())
    assert votes([line], 3) == [0.0]
    for sample in line["samples"]:
        sample["accepted"] = sample["correct"]
    assert votes([line], 3) == [1.0]
    path.write_text(json.dumps(line) + "\n")
    assert read_problems(tmp_path / "a", "plain_sampling")[""].tolist() == [1.0]


def test_self_consistency_refuses_to_vote_with_fewer_samples_than_are_paid_for(tmp_path):
    samples = write_predictions(tmp_path / "a", "plain_sampling", [("1", True, 10)])
    greedy = write_predictions(tmp_path / "b", "guided_greedy", [("1", True, 25)])
    with pytest.raises(UserError, match="25 tokens a problem pay for 2 samples, found 1; evaluate num_samples=2"):
        compare(SelfConsistencyConfig(samples=samples, against=greedy, output=str(tmp_path / "out.json")))


def test_self_consistency_refuses_folders_of_other_problems_or_modes(tmp_path):
    samples = write_predictions(tmp_path / "a", "plain_sampling", [("1", True, 1)])
    greedy = write_predictions(tmp_path / "b", "guided_greedy", [("1", True, 1)], [("1", True, 1)])
    config = SelfConsistencyConfig(samples=samples, against=greedy, output=str(tmp_path / "out.json"))
    with pytest.raises(UserError, match="expected the same problems in the same order"):
        compare(config)
    with pytest.raises(UserError, match="expected predictions of the mode plain_sampling, found none"):
        compare(replace(config, samples=greedy))
