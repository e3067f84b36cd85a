"""Labelled steps, the format of TRL's former PRMTrainer: losses, scores and refusals, against one forward per step."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from test_train import arguments, config, gradients, kill, write_triplets  # noqa: F401 (a fixture)
from torch.nn.functional import logsigmoid

from experiments.__main__ import main as experiments
from llm2 import LLM2, UserError, VerifierTrainer
from llm2.__main__ import main
from llm2.common.chat import BASE, CHATML_PLAIN, LLAMA3_PLAIN
from llm2.common.loading import load_tokenizer
from llm2.config import TrainConfig, VerifierSpec
from llm2.verifier.model import ProcessVerifier
from llm2.verifier.pair_metrics import PairInfo, compute_metrics
from llm2.verifier.scoring import solution_score
from llm2.verifier.steps import step_ends
from llm2.verifier.train import train
from llm2.verifier.triplets import load_examples

ROW = {"prompt": "2 + 5 ?", "completions": ["it is 7", "so 7.", "or 4 ?"], "labels": [True, True, False]}
ROWS = [ROW, {"prompt": "1 ?", "completions": ["é", "b"], "labels": [False, True]}, {**ROW, "prompt": "and ?"}]
USER = [{"role": "user", "content": ROW["prompt"]}]


def prefixes(tokenizer, row) -> list[list[int]]:
    """Ids up to the end of each step, by hand: a token is a byte, so the text up to there has the same tokens."""
    messages = [{"role": "user", "content": row["prompt"]}]
    begin = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    texts = ["\n".join(row["completions"][: i + 1]) for i in range(len(row["completions"]))]
    return [tokenizer(begin + text, add_special_tokens=False)["input_ids"] for text in texts]


def twin_loss(verifier, tokenizer, rows) -> torch.Tensor:
    losses = []
    for row in rows:
        for ids, label in zip(prefixes(tokenizer, row), row["labels"], strict=True):
            score = verifier(torch.tensor([ids])).scores[0, -1]
            losses.append(-logsigmoid(score if label else -score))
    return torch.stack(losses).mean()


SPECS = [
    VerifierSpec(),
    VerifierSpec(kind="lora", lora_r=4),
    VerifierSpec(kind="prefix", token_weight=True),
    VerifierSpec(kind="bilinear"),
    VerifierSpec(kind="mlp", prefix_head_size=4),
]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
@pytest.mark.parametrize("per_device", [3, 2])
def test_loss_and_gradient_equal_those_of_one_forward_per_step(system1_folder, tmp_path, spec, per_device):
    tokenizer = load_tokenizer(system1_folder)
    examples, _ = load_examples("rows", tokenizer, rows=ROWS)
    found = gradients(system1_folder, tmp_path, examples, per_device, 2, spec=spec)
    torch.manual_seed(0)
    verifier = ProcessVerifier.from_system1(system1_folder, spec, local_files_only=True)
    trainer = VerifierTrainer(verifier, arguments(tmp_path), examples, examples, tokenizer)
    evaluated = trainer.evaluate()
    verifier.train()
    loss = twin_loss(verifier, tokenizer, ROWS)
    assert evaluated["eval_pair_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert evaluated["eval_loss"] == pytest.approx(loss.item(), abs=1e-5)
    loss.backward()
    moved = 0.0
    for name, parameter in verifier.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=0, msg=name)
            moved = max(moved, parameter.grad.abs().max().item())
    assert moved > 1e-3


TRIMS = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] | trim + '</' + m['role'] + '>' }}{% endfor %}"


@pytest.mark.parametrize("name", ["bytes", "testbed", "merged"])
@pytest.mark.parametrize("template", [LLAMA3_PLAIN, CHATML_PLAIN, BASE, TRIMS])
def test_a_step_ends_in_the_last_token_of_its_text(system1_folder, name, template):
    """Where the tokenizer merges a step's end with the line break too."""
    tokenizer = load_tokenizer("testbed" if name == "testbed" else system1_folder)
    tokenizer.add_tokens([".\n", "!\n"] if name == "merged" else [])
    steps = [" Ann has 3.", "3 * 4 = 12!\n\n", "é", "It costs $12 "]
    messages = [{"role": "user", "content": "12"}]
    chat = [*messages, {"role": "assistant", "content": "Ann has 3.\n3 * 4 = 12!\né\nIt costs $12"}]
    text = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for step, end in zip(steps, step_ends(tokenizer, messages, steps, template, ""), strict=True):
        before, through = (tokenizer.decode(ids[:stop], skip_special_tokens=False) for stop in (end, end + 1))
        assert step.strip() in through and not before.rstrip("\n").endswith(step.strip()), (step, before, through)


def test_a_template_that_changes_the_answer_is_refused(system1_folder):
    tokenizer = load_tokenizer(system1_folder)
    upper = "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}"
    with pytest.raises(UserError, match="leaves out the message .*'assistant'"):
        load_examples("rows", tokenizer, upper, rows=ROWS)
    no_thoughts = "{% for message in messages %}{{ message['content'].split('</think>')[-1] }}{% endfor %}"
    rows = [ROWS[0] | {"completions": ["so </think>", *ROWS[0]["completions"][1:]]}]
    with pytest.raises(UserError, match="rows, row 1: the chat template changes the text of the steps"):
        load_examples("rows", tokenizer, no_thoughts, rows=rows)


def test_a_tokenizer_that_does_not_say_where_tokens_stand_is_refused(system1_folder, monkeypatch):
    tokenizer = load_tokenizer(system1_folder)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(UserError, match="steps need a fast tokenizer, which says where tokens stand; .* is none"):
        load_examples("rows", tokenizer, rows=ROWS)


def test_a_file_of_steps_is_checked_and_counted(system1_folder, tmp_path, capsys):
    path = write_steps(tmp_path / "steps.jsonl", 5)
    assert main(["check", path, "--tokenizer", system1_folder]) == 0
    printed = capsys.readouterr().out
    assert "steps.jsonl: 5 solutions, 15 labelled steps (5 right); every position fits" in printed
    assert "steps a solution        3        3        3        3" in printed


def test_a_prompt_is_a_text_or_messages(system1_folder):
    tokenizer = load_tokenizer(system1_folder)
    texts, _ = load_examples("rows", tokenizer, rows=ROWS)
    chats = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    assert [*texts] == [*load_examples("rows", tokenizer, rows=Dataset.from_list(chats))[0]]
    assert texts[0].gold_better == [1.0, 1.0, 0.0] and texts[0].ids[texts[0].start] == texts[0].ids[-10 - 11]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"labels": [True, True]},
            "key 'labels': expected true or false for each of the 3 completions, found [True, Tru",
        ),
        ({"labels": [1, 1, 0]}, "key 'labels': expected true or false for each of the 3 completions, found [1, 1, 0]"),
        ({"labels": None}, "key 'labels': expected true or false for each of the 3 completions, found None"),
        ({"completions": []}, "key 'completions': expected a list of steps that is not empty, found []"),
        ({"completions": "a"}, "key 'completions': expected a list of steps that is not empty, found 'a'"),
        ({"completions": ["a", " \n", "b"]}, "key 'completions': expected a step's text, found ' \\n'"),
        ({"completions": ["a", 3, "b"]}, "key 'completions': expected a step's text, found 3"),
        ({"prompt": None}, "key 'prompt': expected a text or messages, found None"),
        ({"prompt": []}, "key 'prompt': expected a text or messages, found []"),
        ({"prompt": [{"role": "cat", "content": ""}]}, "key 'prompt': expected a role of system"),
        ({"samples": [], "messages": USER}, "expected messages and samples, found completions of labelled steps too"),
        ({"completions": None, "messages": USER, "samples": []}, "found triplets, expected labelled steps as before"),
    ],
)
def test_a_bad_row_is_named_before_weights_load(system1_folder, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.setattr(ProcessVerifier, "from_system1", None)
    monkeypatch.setattr("llm2.verifier.system1.load_system1", None)
    rows = [ROW, {**ROW, **change}]
    with pytest.raises(UserError) as refused:
        VerifierTrainer(system1_folder, arguments(tmp_path / "out"), rows)
    assert f"train_dataset, row 2: {message}" in str(refused.value)
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = [f"model={system1_folder}", f"train_file={tmp_path / 'steps.jsonl'}", f"output_dir={tmp_path / 'out'}"]
    assert main(["train", *keys, "device=cpu"]) == 2
    assert f"steps.jsonl, line 2: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"guided_beta": 1.0}, "guided_beta: found 1.0, which is of pairs of tokens; the data are labelled steps"),
        ({"margin": 0.5}, "margin: found 0.5, which is of pairs"),
        ({"best_by": "choice_quality"}, "best_by: found 'choice_quality', which is of pairs"),
        ({"best_by": "guided_pair_loss"}, "best_by: found 'guided_pair_loss', which is of pairs"),
        ({"quality_weight": True}, "line 1: key 'quality': expected [gold's, negative's]"),
    ],
)
def test_what_needs_pairs_is_refused_before_weights_load(step_config, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(ProcessVerifier, "from_system1", None)
    monkeypatch.setattr("llm2.verifier.system1.load_system1", None)
    with pytest.raises(UserError) as refused:
        train(replace(step_config, **changes))
    assert message in str(refused.value)
    if "best_by" in changes:
        changes = {"metric_for_best_model": f"eval_{changes['best_by']}"}
    with pytest.raises(UserError, match="key 'quality'|which is of pairs of tokens"):
        VerifierTrainer(step_config.model, arguments(tmp_path / "out", **changes), ROWS)


def test_steps_and_triplets_do_not_stand_for_each_other(config, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(ProcessVerifier, "from_system1", None)
    monkeypatch.setattr("llm2.verifier.system1.load_system1", None)
    monkeypatch.setattr("experiments.baselines.prefer.load_system1", None)
    path = write_steps(tmp_path / "steps.jsonl", 4)
    with pytest.raises(UserError, match="steps.jsonl, line 1: found labelled steps, expected triplets as before"):
        train(replace(config, further_files=(path,)))
    with pytest.raises(UserError, match="found triplets to train on and labelled steps held out"):
        train(replace(config, eval_file=path))
    assert experiments(["prefer", f"model={config.model}", f"train_file={path}", f"output_dir={tmp_path / 'o'}"]) == 2
    assert "steps.jsonl: expected triplets, found labelled steps" in capsys.readouterr().err
    absent = [{"messages": [*USER, {"role": "assistant", "content": "7"}], "samples": [[0, 0, -1]]}]
    tokenizer = load_tokenizer(config.model)
    absent[0]["samples"][0][:2] = next(iter(load_examples(config.train_file, tokenizer)[0])).triplets[0][:2]
    with pytest.raises(UserError, match="negative token -1 is not in the vocabulary"):
        load_examples("rows", tokenizer, rows=absent)


def test_steps_that_share_a_token_are_refused(system1_folder, tmp_path):
    """So is one without a token before it."""
    tokenizer = load_tokenizer(system1_folder)
    answer_first = "{{ messages[-1]['content'] }}{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match="row 1: the steps .'a', 'b'. share a token"):
        load_examples("rows", tokenizer, answer_first, rows=[{**ROWS[1], "completions": ["a", "b"]}])
    merged = load_tokenizer(system1_folder)
    merged.add_tokens([".\n."])
    with pytest.raises(UserError, match="row 1: the steps .'.', '.'. share a token"):
        load_examples("rows", merged, rows=[{**ROWS[1], "completions": [".", "."]}])


def write_steps(path, count: int) -> str:
    """Steps with a 7 are right and those with a 4 are wrong."""
    rows = []
    for i in range(count):
        labels = [bool(i >> shift & 1) for shift in range(3)]
        steps = [f"{'so' if label else 'or'} {7 if label else 4} ." for label in labels]
        rows.append({"prompt": f"{i} ?", "completions": steps, "labels": labels})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def step_config(system1_folder, tmp_path) -> TrainConfig:
    return TrainConfig(
        model=system1_folder,
        train_file=write_steps(tmp_path / "steps.jsonl", 40),
        output_dir=str(tmp_path / "verifier"),
        eval_share=0.2,
        num_train_epochs=4.0,
        learning_rate=2e-3,
        global_batch_size=8,
        per_device_train_batch_size=4,
        device="cpu",
    )


@pytest.mark.one_in(4)
@pytest.mark.parametrize("kind", ["full", "lora", "prefix", "bilinear"])
def test_training_learns_the_labels_and_reads_no_system1(step_config, tmp_path, monkeypatch, capsys, kind):
    """Then the solution with the right steps is the best of two."""
    monkeypatch.setattr("llm2.verifier.system1.load_system1", None)
    rate, epochs = {"full": (2e-3, 6.0), "lora": (1e-2, 6.0), "prefix": (2e-3, 6.0), "bilinear": (3e-2, 20.0)}[kind]
    keys = [f"{key}={getattr(step_config, key)}" for key in ("model", "train_file", "output_dir", "eval_share")]
    keys += [f"kind={kind}", f"learning_rate={rate}", f"num_train_epochs={epochs}", "global_batch_size=8", "device=cpu"]
    assert main(["train", *keys]) == 0
    metrics = json.loads(Path(step_config.output_dir, "training.json").read_text())
    printed = capsys.readouterr().out
    assert metrics["eval_pairs"] == 24 == metrics["eval_pairs_right"] + metrics["eval_pairs_wrong"]
    assert metrics["eval_pair_accuracy"] >= 0.9 and not any("system1" in key or "choice" in key for key in metrics)
    assert "40 solutions, 120 labelled steps (" in printed and "steps a solution" in printed
    assert f"the sign of the score is the label in {metrics['eval_pair_accuracy']:.1%} [" in printed
    card = Path(step_config.output_dir, "README.md").read_text()
    assert "Held-out steps whose label is the sign of their score (n = 24): " in card and "System 1 " not in card[-600:]
    llm2 = LLM2.from_pretrained(step_config.model, step_config.output_dir, device="cpu")
    right, wrong = ["so 7 .", "so 7 ."], ["so 7 .", "or 4 ."]
    for reduction in ("mean", "min", "last", "product"):
        good, bad = llm2.score("3 ?", [right, wrong], reduction)
        assert good > bad


@pytest.mark.long
def test_a_dataset_trains_as_the_command_does_and_a_killed_run_resumes(step_config, tmp_path, monkeypatch):
    eval_file = write_steps(tmp_path / "eval.jsonl", 9)
    whole = replace(step_config, eval_file=eval_file, num_train_epochs=1.0, evaluations=2)
    expected = train(whole)
    torn = replace(whole, output_dir=str(tmp_path / "torn"))
    with monkeypatch.context() as patch:
        patch.setattr(VerifierTrainer, "_load_best_model", kill)
        with pytest.raises(InterruptedError):
            train(torn)
    newest = max(Path(torn.output_dir).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(newest)
    assert train(torn)["eval_pair_loss"] == pytest.approx(expected["eval_pair_loss"], abs=1e-6)

    data = [Dataset.from_list(read(path)) for path in (whole.train_file, eval_file)]
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    rates = {"learning_rate": whole.learning_rate, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}
    args = arguments(tmp_path / "python", seed=0, data_seed=0, weight_decay=0.0, **sizes, **rates)
    trainer = VerifierTrainer(whole.model, args, *data)
    trainer.train()
    assert trainer.evaluate()["eval_pair_loss"] == pytest.approx(expected["eval_pair_loss"], abs=1e-6)


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """With the line that is shown, and the name of a model that needs no network."""
    text = Path("llm2/verifier/README.md").read_text().split("## From TRL's PRMTrainer")[1]
    row = text.split("```json\n")[1].split("```")[0]
    (tmp_path / "steps.jsonl").write_text(row * 20)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert names["trainer"].state.log_history[-1]["eval_pairs"] == 4
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])) == 2


def test_a_language_model_loss_beside_steps_measures_nothing_of_system1(step_config):
    metrics = train(replace(step_config, lm_loss_coef=0.1, num_train_epochs=1.0, evaluations=1))
    assert math.isfinite(metrics["eval_pair_loss"]) and not any(key.startswith("system1") for key in metrics)


def test_accuracy_is_the_share_of_steps_whose_score_has_the_labels_sign():
    pairs = {i: PairInfo(1, "word", label) for i, label in enumerate(["right", "right", "wrong", "wrong", "wrong"])}
    found = compute_metrics({0: 2.0, 1: -1.0, 2: -3.0, 3: -0.5, 4: 1.0}, pairs)
    assert found["pair_accuracy"] == 3 / 5 and found["pair_accuracy_right"] == 1 / 2
    assert found["pair_accuracy_wrong"] == pytest.approx(2 / 3) and found["pairs_right"] == 2
    assert found["mean_margin"] == pytest.approx((2 - 1 + 3 + 0.5 - 1) / 5)
    losses = [math.log1p(math.exp(-signed)) for signed in (2, -1, 3, 0.5, -1)]
    assert found["pair_loss"] == pytest.approx(sum(losses) / 5)


# --- Scores ---


@pytest.fixture(scope="module", params=["full", "bilinear"])
def verifier_folder(request, system1_folder, tmp_path_factory) -> str:
    torch.manual_seed(3)
    folder = str(tmp_path_factory.mktemp("verifier"))
    spec = VerifierSpec(kind=request.param)
    ProcessVerifier.from_system1(system1_folder, spec, local_files_only=True).save_pretrained(folder)
    load_tokenizer(system1_folder).save_pretrained(folder)
    return folder


def test_a_steps_score_is_that_of_one_forward_up_to_it(system1_folder, verifier_folder):
    llm2 = LLM2.from_pretrained(system1_folder, verifier_folder, device="cpu")
    verifier, steps = llm2.guidance.verifier, ROW["completions"]
    found, first = llm2.score(ROW["prompt"], [steps, steps[:1]], None)
    with torch.inference_mode():
        expected = [verifier(torch.tensor([ids])).scores[0, -1].item() for ids in prefixes(llm2.tokenizer, ROW)]
    assert found == pytest.approx(expected, abs=1e-4) and first == pytest.approx(expected[:1], abs=1e-4)
    everything = llm2.score(ROW["prompt"], ["\n".join(steps)], None)[0]
    assert found[-1] == pytest.approx(everything[-2], abs=1e-4), "the end of sequence comes last"
    with pytest.raises(UserError, match="solution 1: key 'solutions': expected a step's text, found ' '"):
        llm2.score("?", ["a", ["b", " "]])


def test_the_product_is_the_log_probability_that_all_steps_are_right():
    log = sum(math.log(1 / (1 + math.exp(-score))) for score in (1.0, -2.0, 4.0))
    assert solution_score([1.0, -2.0, 4.0], "product") == pytest.approx(log)
    assert solution_score([-2000.0], "product") == -2000.0


def test_llm2_score_ranks_solutions_in_steps(system1_folder, verifier_folder, tmp_path, capsys):
    solutions = [ROW["completions"], ["The answer is 3.", "no"], ["So the answer is 2."]]
    records = [{"messages": USER, "solutions": solutions, "gold": "2"}, {**ROW, "gold": "2"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    keys = [f"model={system1_folder}", f"verifier={verifier_folder}", "device=cpu", "task=gsm8k", "reduction=min"]
    assert main(["score", str(tmp_path / "in.jsonl"), *keys, f"output={tmp_path / 'out.jsonl'}"]) == 0
    first, second = read(tmp_path / "out.jsonl")
    llm2 = LLM2.from_pretrained(system1_folder, verifier_folder, device="cpu")
    expected = llm2.score(USER, solutions, None)
    for found, scores in zip(first["step_scores"], expected, strict=True):
        assert found == pytest.approx(scores, abs=1e-4)
    assert first["scores"] == [min(scores) for scores in first["step_scores"]]
    assert first["best"] == first["scores"].index(max(first["scores"]))
    assert first["answers"][1:] == ["3", "2"] and first["solutions"] == solutions
    assert second["step_scores"] == [pytest.approx(expected[0], abs=1e-4)] and second["labels"] == ROW["labels"]
    assert "line 1: best of 3 is solution" in capsys.readouterr().out


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": USER, "solutions": [["a"], "b"]}, "line 1: key 'solutions': expected a text, found ['a']"),
        ({"messages": USER, "solutions": [["a", ""]]}, "line 1: key 'solutions': expected a step's text, found ''"),
        ({"messages": USER, "solutions": [[]]}, "line 1: key 'solutions': expected a list of steps that is not empty"),
        ({"completions": ["a"]}, "line 1: key 'prompt': expected a text or messages, found None"),
        ({"prompt": "?", "completions": []}, "line 1: key 'completions': expected a list of steps that is not empty"),
    ],
)
def test_bad_steps_are_refused_before_weights_load(
    system1_folder, verifier_folder, tmp_path, capsys, monkeypatch, record, message
):
    monkeypatch.setattr("llm2.evaluation.rank.load_system1", None)
    (tmp_path / "in.jsonl").write_text(json.dumps(record) + "\n")
    keys = [f"model={system1_folder}", f"verifier={verifier_folder}", "device=cpu", f"output={tmp_path / 'out.jsonl'}"]
    assert main(["score", str(tmp_path / "in.jsonl"), *keys]) == 2
    assert message in capsys.readouterr().err
