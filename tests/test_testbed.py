"""The testbed: its problems, its careless corpus, its tokenizer, and how its System 1 is made."""

import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from experiments.testbed import corpus
from experiments.testbed.config import GenerateConfig, PretrainConfig
from experiments.testbed.corpus import MISREADINGS, careless_conversations, careless_solution, two_skills_conversations
from experiments.testbed.generate import generate
from experiments.testbed.mistakes import has_false_equation
from experiments.testbed.model_card import Measured, card
from experiments.testbed.pretrain import collate, examples, pretrain
from experiments.testbed.regimes import (
    FORMER_NAMES,
    NESTED,
    REGIMES,
    UNWORKED,
    Foreign,
    Sorting,
    foreign_answer,
    sorting_problems,
)
from experiments.testbed.tokenizer import train_tokenizer
from llm2.common.config_file import load_config
from llm2.common.jsonl import read_jsonl
from llm2.errors import UserError
from llm2.tasks import load_task
from llm2.tasks.gsm8k import to_problem
from llm2.testbed.facts import SENTENCES, TABLES, WORDS
from llm2.testbed.generator import SIZES, problems, split_of, stories, worked_answer
from llm2.testbed.stories import Computed, Given, Step, Story
from llm2.verifier.loss import IGNORE_INDEX

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
def test_problems_do_not_depend_on_how_many_are_drawn(split):
    assert problems(split, 50)[:20] == problems(split, 20)


def test_without_n_all_problems_of_a_split_are_drawn():
    assert len(problems("validation")) == 500


SAME = {
    "pretrain": "6c84a54d17cdc4cb4e8569eca742a4766bb1ff040b02ca22fe081b4b67b694a8",
    "train": "aa868ecdfebdea2631a015344b331476adf25a6d7efda5b4be8eddfba05b1b2d",
    "validation": "71367b096a0d134a4d9e403aebecb5b6970267104d6f6f382f7304fa9d97a63a",
    "test": "89bebbb680a00626ed02a88403d8c7a301941bfd6d97d097850e06614e4001a7",
}
CORPUS = "93858cd4794180e3f09dab4fdecbd4969c7f3995f3e338b40153b2097b5eef15"


def digest(values: list) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def test_the_problems_and_the_corpus_behind_the_committed_system1_never_change():
    assert {split: digest(problems(split, 300)) for split in SIZES} == SAME
    assert digest(list(careless_conversations(300))) == CORPUS


@pytest.mark.long
def test_splits_never_share_a_problem_in_any_regime():
    drawn = {split: set() for split in SIZES}
    for regime in REGIMES.values():
        for split, questions in drawn.items():
            new = {problem["question"] for problem in problems(split, 100, regime)}
            assert len(new) == 100 and {split_of(question) for question in new} == {split}
            questions |= new
    assert len(set.union(*drawn.values())) == sum(map(len, drawn.values())) > 0.99 * 4 * len(REGIMES) * 100


OF_REGIMES = {
    "Foreign": "d86822288e811fb0428b013dbd212fd77cf54adbd0bb423f788d794cf872077e",
    "Answers": "0da6e0cbc34508e8c01cd9efe9f072470159de48b1d418fff2978bbcf212fbdc",
    "Careful": "47e38ebdc11464ca46f02dfd94ecaed504de3f18a4f64f4c8b2159e6aba1273a",
    "TwoSkills": "79c771eea98e26bcfb1c11bcef2a7ef7d313dc990ca4e1c46819d0da58c609f5",
    "MoreSteps": "79387eb5f1512d1bc961bb4dc396f47223b88d8dd1216beb1e0ec0e64fbd0858",
    "NewWords": "6737e38cc77951ce53f9a40ddc8e022c05f723ad67599cb23457244835758932",
    "LargeNumbers": "01c933bbad07e4bdd3c506074c687aeeda5591fe3a27868064e041fe7402ef16",
    "Sorting": "03a462659ee46a7667dd1f99f57a39b63499099db6afc9150c81f9bab52926ba",
}


def test_the_problems_of_the_studies_never_change():
    drawn = {name: digest([asdict(each) for each in load_task(name).problems("train", 50)]) for name in FORMER_NAMES}
    assert {name.split(":")[1]: value for name, value in drawn.items()} == OF_REGIMES


def test_foreign_solutions_are_right_terse_and_in_other_words():
    foreign = REGIMES["foreign"]
    worked, unworked, nested = 0, 0, 0
    for problem, story in zip(problems("train", 400, foreign), stories("train", foreign), strict=False):
        *lines, last = problem["answer"].split("\n")
        assert last == f"#### {story.values[-1]}" and len(lines) == (len(story.steps) + 1) // 2
        for line in lines:
            for step in re.search(r"[\d(](.*\d)?", line).group().split(" and "):
                expression, equals, result = step.rpartition("=")
                assert int(result) in story.values and (not equals or eval(expression) == int(result))
                worked, unworked, nested = worked + bool(equals), unworked + (not equals), nested + ("(" in step)
        assert not set(lines) & set(worked_answer(story).split("\n"))
        assert problem["answer"] == foreign_answer(story)  # one and the same for a question
    assert unworked / (worked + unworked) == pytest.approx(UNWORKED, abs=0.04) and 0.02 < nested / worked < NESTED


def test_varieties_go_beyond_what_system1_has_read():
    def drawn(regime: str) -> list[Story]:
        return list(islice(stories("test", REGIMES[regime]), 100))

    assert min(len(story.steps) for story in drawn("more_steps")) > max(len(s.steps) for s in drawn("same"))
    assert all(max(story.values) > 100 for story in drawn("large_numbers"))
    assert all(max(story.values) <= 150 for regime in ("new_words", "more_steps") for story in drawn(regime))
    assert not {story.slots["who"] for story in drawn("same")} & {story.slots["who"] for story in drawn("new_words")}
    assert not set(WORDS["things"]) & {story.slots["things"] for story in drawn("new_words")}
    assert all(
        value == to_problem("", story.question, worked_answer(story)).gold
        for story in drawn("large_numbers")
        for value in [str(story.values[-1])]
    )


def test_lists_are_sorted_rightly_and_split():
    drawn = {split: sorting_problems(split, 100) for split in SIZES}
    for split, lists in drawn.items():
        for each in lists:
            numbers = [int(number) for number in re.findall(r"\d+", each["question"])]
            assert each["answer"] == ", ".join(map(str, sorted(numbers))) and split_of(each["question"]) == split
    assert len({each["question"] for lists in drawn.values() for each in lists}) == 400


def test_regimes_have_problems_of_their_own_and_answers_alone_no_solution():
    drawn = {name: load_task(name).problems("validation", 20) for name in ("testbed", *FORMER_NAMES)}
    assert len({problem.question for of_regime in drawn.values() for problem in of_regime}) == 20 * len(drawn)
    assert {problem.solution for problem in drawn["experiments.testbed.regimes:Answers"]} == {""}
    for name, of_regime in drawn.items():
        for problem in of_regime:
            (grade,) = load_task(name).grade([problem.solution or f"So the answer is {problem.gold}."], problem.gold)
            assert grade.correct
    sorting = Sorting()
    assert [grade.correct for grade in sorting.grade(["In order: 3, 20, 9.", "3, 9, 20", "None."], "3, 9, 20")] == [
        False,
        True,
        False,
    ]


def test_the_corpus_of_two_skills_alternates_between_them():
    conversations = [[message["content"] for message in each] for each in two_skills_conversations(6)]
    assert [solution.startswith("In order they are ") for _, solution in conversations] == [False, True] * 3
    assert [question for question, _ in conversations[::2]] == [p["question"] for p in problems("pretrain", 3)]


def test_generated_files_hold_what_the_tasks_draw(tmp_path):
    path = str(tmp_path / "new" / "data.jsonl")
    assert generate(GenerateConfig(output=path, regime="foreign", split="validation", limit=5)) == 5
    assert load_task("gsm8k", path).problems("any") == Foreign().problems("validation", 5)
    generate(GenerateConfig(output=path, regime="sorting", limit=3))
    answers = [record["answer"] for _, record in read_jsonl(path)]
    assert answers == [problem.gold for problem in Sorting().problems("train", 3)]
    generate(GenerateConfig(output=path, corpus=True, limit=4))
    assert len(load_task("chats", path).problems("any")) == 4


def test_annotations_are_correct_and_the_last_one_is_the_answer():
    for problem in problems("test", 500):
        *lines, last = problem["answer"].split("\n")
        steps = [ANNOTATION.search(line).groups() for line in lines]
        for left, operator, right, result in steps:
            assert eval(f"{left} {operator} {right}") == int(result)
        assert last == f"#### {steps[-1][3]}"


def test_problems_have_one_to_six_steps_and_all_operations():
    lengths, operators = Counter(), Counter()
    for problem in problems("test", 1000):
        steps = ANNOTATION.findall(problem["answer"])
        lengths[len(steps)] += 1
        operators.update(operator for _, operator, _, _ in steps)
    assert set(lengths) == {1, 2, 3, 4, 5, 6}
    assert set(operators) == set("+-*/")


def test_every_misreading_is_of_a_phrase_of_some_fact():
    assert MISREADINGS.keys() == {fact.phrase for table in TABLES.values() for fact in table} - {""}


def test_phrases_are_misread_at_their_rates():
    rng, phrases, errors = random.Random(0), Counter(), Counter()
    for story in SOME_STORIES * 4:
        phrases.update(step.phrase for step in story.steps)
        errors.update(careless_solution(story, rng).errors)
    for phrase, misreading in MISREADINGS.items():
        assert errors[phrase] / phrases[phrase] == pytest.approx(misreading.rate, abs=0.06), phrase
    steps = sum(phrases.values())
    assert errors["slip"] / steps == pytest.approx(corpus.SLIP, abs=0.004)
    assert errors["operand"] / steps == pytest.approx(corpus.WRONG_OPERAND, abs=0.004)
    assert errors["skipped"] / steps == pytest.approx(corpus.SKIPPED, abs=0.003)


def test_an_error_is_carried_through_to_the_answer():
    """Of 12 apples 2 friends get 3 each, the rest is sold for $5 each; misread: 3 given away, 9 left, $45."""
    steps = (
        Step(Given(2), "*", Given(3), SENTENCES["gives"], "each friend"),
        Step(Given(12), "-", Computed(0), SENTENCES["left"], ""),
        Step(Computed(1), "*", Given(5), SENTENCES["makes"], ""),
    )
    story = Story("", steps, (6, 6, 30), {"who": "Tom", "things": "apples"})
    drawn = [careless_solution(story, random.Random(seed)) for seed in range(60)]
    misread = [solution for solution in drawn if solution.errors == ("each friend",)]
    assert "Tom has 12 - 3 = 9 apples left. Tom makes 9 * 5 = 45 dollars. So the answer is 45." in [
        solution.text for solution in misread
    ]
    assert {solution.answer for solution in misread} == {45}
    assert {solution.answer for solution in drawn if not solution.errors} == {30}


@pytest.mark.parametrize("sign, right, wrong", [("+", 15, 16), ("-", 9, 3), ("*", 36, 26), ("/", 4, 5)])
def test_a_false_equation_is_found_wherever_it_stands(sign, right, wrong):
    held = f"Nina has 12 {sign} 3 = {right} shells. "
    broken = held.replace(f"= {right}", f"= {wrong}")
    assert not has_false_equation(held + held) and not has_false_equation("So the answer is 4.")
    assert has_false_equation(held + broken) and has_false_equation(broken + held)
    assert has_false_equation("Each friend gets 7 / 0 = 7 shells.") and has_false_equation("They get 7 / 2 = 3.")


def test_gold_solutions_have_no_false_equation_in_any_regime():
    for regime in ("testbed", "experiments.testbed.regimes:Foreign", "experiments.testbed.regimes:Careful"):
        solutions = [problem.solution for problem in load_task(regime).problems("train", 300)]
        assert len(solutions) == 300 and not any(map(has_false_equation, solutions))


def test_solutions_without_an_error_have_the_right_answer_and_all_steps():
    rng = random.Random(0)
    for story in SOME_STORIES:
        solution = careless_solution(story, rng)
        if not solution.errors:
            assert solution.answer == story.values[-1]
            assert len(solution.text.split(". ")) == len(story.steps) + 1


def test_errors_seldom_leave_the_answer_right():
    """Otherwise a verifier would have nothing to correct."""
    rng = random.Random(0)
    drawn = [(story, careless_solution(story, rng)) for story in SOME_STORIES]
    lucky = [solution.answer == story.values[-1] for story, solution in drawn if solution.errors]
    assert sum(lucky) / len(lucky) < 0.05


def test_tokenizer_round_trips(tokenizer):
    for text in ("Tom has 48 / 2 = 24 apples.", "  $3\n\nnaïve 第 ", *(story.question for story in SOME_STORIES[:20])):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_digit_is_a_token_of_its_own(tokenizer):
    digits = [tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"]
    for text in ("$7305", "has 7305 apples", "7305."):
        ids = tokenizer(text)["input_ids"]
        assert [index for index in ids if index in digits] == [digits[7], digits[3], digits[0], digits[5]]
    assert not [token for token in tokenizer.get_vocab() if len(token) > 1 and re.search(r"\d", token)]


def test_chat_template_adds_no_text_of_its_own(tokenizer, conversations):
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


def test_loss_is_on_the_assistants_message_only(tokenizer, conversations):
    (example,) = examples(conversations[:1], tokenizer)
    labels = [label for label in example["labels"] if label != IGNORE_INDEX]
    assert tokenizer.decode(labels) == conversations[0][1]["content"] + "<|eot_id|>"
    batch = collate([example, {"input_ids": [1], "labels": [1]}], pad=4)
    assert batch["input_ids"][1].tolist() == [1] + [4] * (len(example["input_ids"]) - 1)
    assert batch["labels"][1].tolist() == [1] + [IGNORE_INDEX] * (len(example["labels"]) - 1)


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


def test_pretraining_refuses_several_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="pretrain: found 2 processes, expected 1"):
        pretrain(tiny_config(tmp_path))


@pytest.mark.long
@pytest.mark.parametrize("last", [2, 4])
def test_an_interrupted_pretraining_resumes_to_the_same_files(last, tmp_path, monkeypatch):
    """Interrupted within training, and twice after its last step, while the model card is measured."""
    pretrain(tiny_config(tmp_path / "whole"))
    step = Trainer.training_step

    def killed_at_the_fourth(trainer, *arguments, **keywords):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return step(trainer, *arguments, **keywords)

    def killed_at_the_card(*_):
        raise KeyboardInterrupt

    for _ in range(last // 2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if last == 2:
                patch.setattr(Trainer, "training_step", killed_at_the_fourth)
            else:
                patch.setattr("experiments.testbed.pretrain.measured_card", killed_at_the_card)
            pretrain(tiny_config(tmp_path / "parts"))
    assert (tmp_path / f"parts/checkpoints/checkpoint-{last}").is_dir()
    with pytest.raises(UserError, match="checkpoints is of another config: learning_rate was 0.002 and now is 0.1"):
        pretrain(replace(tiny_config(tmp_path / "parts"), learning_rate=0.1))
    pretrain(tiny_config(tmp_path / "parts"))
    whole, parts = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("whole", "parts")
    )
    assert whole == parts and {"README.md", "model.safetensors", "tokenizer.json"} <= whole.keys()


def test_the_committed_system1_loads_and_is_small(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = AutoModelForCausalLM.from_pretrained(SYSTEM1, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(SYSTEM1, local_files_only=True)
    assert 1e6 <= model.num_parameters() <= 4e6
    assert (SYSTEM1 / "model.safetensors").stat().st_size <= 8e6
    assert model.config.vocab_size == len(tokenizer)
    config = load_config(PretrainConfig, ROOT / "configs/testbed/pretrain.yaml")
    shape = config.shape()
    assert {key: getattr(model.config, key) for key in shape} == shape


def test_the_committed_model_card_is_what_pretraining_writes():
    config = load_config(PretrainConfig, ROOT / "configs/testbed/pretrain.yaml")
    measured = Measured(
        problems=500,
        sampled_problems=200,
        greedy=0.542,
        unambiguous=0.913,
        unambiguous_problems=289,
        sampled=0.5,
        majority=0.575,
        passed=0.95,
        reachable=0.982,
    )
    text = card(config, parameters=1_342_880, vocabulary=640, loss=0.340, measured=measured)
    assert text == (SYSTEM1 / "README.md").read_text()


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
