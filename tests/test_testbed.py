"""The testbed: its problems, its careless corpus, its tokenizer, and how its System 1 is made."""

import random
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from llm2.common.config_file import load_config
from llm2.config import PretrainConfig
from llm2.testbed import facts, words
from llm2.testbed.generator import SIZES, gold_solution, problems, split_of, stories
from llm2.testbed.stories import Step, Story, Told, Worked
from llm2.testbed.train import corpus
from llm2.testbed.train.corpus import MISREADINGS, careless_conversations, careless_solution
from llm2.testbed.train.pretrain import IGNORED, collate, examples, pretrain
from llm2.testbed.train.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]
SYSTEM1 = ROOT / "llm2/testbed/system1"
ANNOTATION = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>")
SOME_STORIES = list(islice(stories("pretrain"), 1500))


@pytest.fixture(scope="module")
def conversations():
    return list(careless_conversations(500))


@pytest.fixture(scope="module")
def tokenizer(conversations):
    return train_tokenizer((message["content"] for messages in conversations for message in messages), 640)


@pytest.mark.parametrize("split", SIZES)
def test_problems_are_the_same_each_time_and_whatever_n(split):
    assert problems(split, 50)[:20] == problems(split, 20)


def test_a_split_without_n_has_its_own_size():
    assert len(problems("validation")) == 500


def test_splits_never_share_a_problem():
    drawn = {split: [problem["question"] for problem in problems(split, 800)] for split in SIZES}
    for split, questions in drawn.items():
        assert {split_of(question) for question in questions} == {split}
    assert len({question for questions in drawn.values() for question in questions}) == 4 * 800


def test_annotations_compute_right_and_the_last_is_the_answer():
    for problem in problems("test", 500):
        *lines, last = problem["answer"].split("\n")
        worked = [ANNOTATION.search(line).groups() for line in lines]
        for left, operator, right, result in worked:
            assert eval(f"{left} {operator} {right}") == int(result)
        assert last == f"#### {worked[-1][3]}"


def test_gold_solution_is_the_answer_without_annotations():
    for story, problem in zip(stories("test"), problems("test", 100), strict=False):
        *lines, last = re.sub(r"<<.*?>>", "", problem["answer"]).split("\n")
        assert gold_solution(story) == " ".join([*lines, f"So the answer is {last.removeprefix('#### ')}."])


def test_problems_hold_one_to_six_steps_and_all_operations():
    lengths, operators = Counter(), Counter()
    for problem in problems("test", 1000):
        worked = ANNOTATION.findall(problem["answer"])
        lengths[len(worked)] += 1
        operators.update(operator for _, operator, _, _ in worked)
    assert set(lengths) == {1, 2, 3, 4, 5, 6}
    assert set(operators) == set("+-*/")


def test_phrases_are_misread_at_their_rates():
    rng, met, misread = random.Random(0), Counter(), Counter()
    for story in SOME_STORIES * 4:
        met.update(step.phrase for step in story.steps)
        misread.update(careless_solution(story, rng).mishaps)
    for phrase, misreading in MISREADINGS.items():
        assert misread[phrase] / met[phrase] == pytest.approx(misreading.rate, abs=0.06), phrase
    steps = sum(met.values())
    assert misread["slip"] / steps == pytest.approx(corpus.SLIP, abs=0.004)
    assert misread["operand"] / steps == pytest.approx(corpus.WRONG_OPERAND, abs=0.004)
    assert misread["skipped"] / steps == pytest.approx(corpus.SKIPPED, abs=0.003)


def test_an_error_is_carried_through_to_the_answer():
    """12 apples, each of 2 friends gets 3, the rest sold for $5: misread as 3 given away, 9 left, $45."""
    steps = (
        Step(Told(2), "*", Told(3), words.GIVES, facts.EACH_FRIEND),
        Step(Told(12), "-", Worked(0), words.LEFT, ""),
        Step(Worked(1), "*", Told(5), words.MAKES, ""),
    )
    story = Story("", steps, (6, 6, 30), {"who": "Tom", "things": "apples"})
    drawn = [careless_solution(story, random.Random(seed)) for seed in range(60)]
    misread = [solution for solution in drawn if solution.mishaps == (facts.EACH_FRIEND,)]
    assert "Tom has 12 - 3 = 9 apples left. Tom makes 9 * 5 = 45 dollars. So the answer is 45." in [
        solution.text for solution in misread
    ]
    assert {solution.answer for solution in misread} == {45}
    assert {solution.answer for solution in drawn if not solution.mishaps} == {30}


def test_solutions_without_a_mishap_are_as_good_as_gold():
    rng = random.Random(0)
    for story in SOME_STORIES:
        solution = careless_solution(story, rng)
        if not solution.mishaps:
            assert solution.answer == story.values[-1]
            assert len(solution.text.split(". ")) == len(story.steps) + 1


def test_a_mishap_seldom_leaves_the_answer_right():
    """Else careless text would hold no errors for a verifier to mend."""
    rng = random.Random(0)
    drawn = [(story, careless_solution(story, rng)) for story in SOME_STORIES]
    lucky = [solution.answer == story.values[-1] for story, solution in drawn if solution.mishaps]
    assert sum(lucky) / len(lucky) < 0.05


def test_tokenizer_round_trips(tokenizer):
    for text in ("Tom has 48 / 2 = 24 apples.", "  $3\n\nnaïve 第 ", *(story.question for story in SOME_STORIES[:20])):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_are_single_tokens_whatever_stands_beside_them(tokenizer):
    digits = [tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"]
    for text in ("$7305", "has 7305 apples", "7305."):
        ids = tokenizer(text)["input_ids"]
        assert [index for index in ids if index in digits] == [digits[7], digits[3], digits[0], digits[5]]
    assert not [token for token in tokenizer.get_vocab() if len(token) > 1 and re.search(r"\d", token)]


def test_chat_template_writes_what_the_messages_hold(tokenizer, conversations):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": " Hi? "}, {"role": "assistant", "content": "Yes."}], tokenize=False
    )
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n Hi? <|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
    )
    assert tokenizer.eos_token == "<|eot_id|>"


def test_prompt_ids_are_a_prefix_of_the_conversation(tokenizer, conversations):
    for messages in conversations:
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        assert whole[: len(prompt)] == prompt
        assert tokenizer(tokenizer.decode(whole), add_special_tokens=False)["input_ids"] == whole


def test_only_the_assistants_part_carries_loss(tokenizer, conversations):
    (example,) = examples(conversations[:1], tokenizer)
    labels = [label for label in example["labels"] if label != IGNORED]
    assert tokenizer.decode(labels) == conversations[0][1]["content"] + "<|eot_id|>"
    batch = collate([example, {"input_ids": [1], "labels": [1]}], pad=4)
    assert batch["input_ids"][1].tolist() == [1] + [4] * (len(example["input_ids"]) - 1)
    assert batch["labels"][1].tolist() == [1] + [IGNORED] * (len(example["labels"]) - 1)


def tiny_config(folder: Path) -> PretrainConfig:
    tiny = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=300,
    )
    run = dict(documents=24, max_steps=4, batch_size=2, save_steps=2, card_problems=1)
    return PretrainConfig(output_dir=str(folder), **tiny, **run)


def test_an_interrupted_pretraining_goes_on_to_the_same_model(tmp_path, monkeypatch):
    pretrain(tiny_config(tmp_path / "whole"))
    step = Trainer.training_step

    def killed_at_the_fourth(trainer, *arguments, **keywords):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return step(trainer, *arguments, **keywords)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "training_step", killed_at_the_fourth)
        pretrain(tiny_config(tmp_path / "parts"))
    assert (tmp_path / "parts/checkpoints/checkpoint-2").is_dir()
    pretrain(tiny_config(tmp_path / "parts"))
    whole, parts = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], weight, msg=name)
    assert {file.name for file in (tmp_path / "parts").iterdir()} >= {
        "README.md",
        "model.safetensors",
        "tokenizer.json",
    }
    assert not (tmp_path / "parts/checkpoints").exists()


def test_the_committed_system1_loads_and_is_small(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = AutoModelForCausalLM.from_pretrained(SYSTEM1, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(SYSTEM1, local_files_only=True)
    assert 1e6 <= model.num_parameters() <= 4e6
    assert (SYSTEM1 / "model.safetensors").stat().st_size <= 8e6
    assert model.config.vocab_size == len(tokenizer)
    config = load_config(PretrainConfig, ROOT / "configs/testbed/pretrain.yaml")
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (config.hidden_size, config.layers)


def test_the_committed_system1_solves_a_plain_problem():
    model = AutoModelForCausalLM.from_pretrained(SYSTEM1, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(SYSTEM1, local_files_only=True)
    messages = [
        {
            "role": "user",
            "content": "Tom has 12 apples. He buys 5 more apples. How many apples does Tom have in the end?",
        }
    ]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=60)
    text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.endswith("So the answer is 17.")
