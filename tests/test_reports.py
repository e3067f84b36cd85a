"""Inputs like those of public reports about other projects, on ours; tests/reports.md says what became of each."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_system1, tiny_tokenizer
from transformers import TextIteratorStreamer

from llm2 import LLM2
from llm2.common.chat import LLAMA3_PLAIN, encode_chats
from llm2.common.jsonl import read_jsonl
from llm2.common.loading import load_tokenizer
from llm2.common.stats import majority_curve
from llm2.config import ExploreConfig, VerifierSpec
from llm2.decoding.sampling import SamplingParams, sample
from llm2.errors import UserError
from llm2.exploration.explore import explore
from llm2.exploration.solutions import tokenize_solutions
from llm2.tasks import load_task
from llm2.tasks.grading import extract_answer, grade_numbers, is_correct
from llm2.verifier.model import ProcessVerifier
from llm2.verifier.triplets import load_examples

REPORTS = Path(__file__).with_name("reports.md")


def test_the_log_names_each_report_once_and_the_tests_that_it_claims():
    rows = [line.split("|")[1:-1] for line in REPORTS.read_text().splitlines() if line.startswith("| ") and "#" in line]
    names = [row[0].strip() for row in rows]
    assert len(names) >= 24 and len(set(names)) == len(names)
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for row in rows:
        for test in (word.strip("`,.") for word in row[3].split() if word.startswith("`test_")):
            assert f"def {test}(" in tests, test


# --- Grading ---


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("#### +5", "5", "5"),
        ("The answer is +5, which is 3 more than 2.", "5", "5"),
        ("It fell from 2 to -3, so the answer is -3.", "-3", "-3"),
        ("The answer is 10\u202f000 people.", "10000", "10000"),
        ("The answer is 10\u00a0000\u00a0000.", "10000000", "10000000"),
        ("In 2\u00a01000 g bags", None, "1000"),  # no group of three
        ("The total is 72 clips, altogether.", None, "72"),
        ("\\boxed{$9{,}500}", None, "9500"),
        ("So 24 * 3 = 72.\n#### 72\n\nQuestion: How many cups are 2 + 3?\n#### 5", "72", "72"),
    ],
)
def test_answers_with_signs_separators_and_text_behind_are_read(text, strict, flexible):
    assert (extract_answer(text, "strict"), extract_answer(text)) == (strict, flexible)


def test_equal_numbers_in_different_forms_vote_together():
    texts = ["\\boxed{\\frac{1}{2}}", "The answer is 0.50", "The answer is 3", "The answer is 4"]
    grades = grade_numbers(texts, "0.5")
    assert [grade.answer for grade in grades] == ["0.5", "0.5", "3", "4"]
    assert majority_curve([grade.answer for grade in grades], "0.5")[-1] == 1.0
    assert is_correct("50$", "50") and is_correct("It is 4.0", "4")


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("\\frac{1}{2^{99}}", "\\frac{1}{2^{98}}", False),
        ("\\frac{1}{2004!}", "\\frac{1}{2006!}", False),
        ("0", "0.0000001", False),
        ("\\frac{1}{2^{99}}", "2^{-99}", True),
        ("\\frac{1}{12}", "0.0833333", True),
    ],
)
def test_formulas_of_tiny_values_are_compared_by_their_ratio(gold, answer, right):
    pytest.importorskip("math_verify")
    from llm2.tasks.math500 import grade

    assert grade(f"\\boxed{{{answer}}}", gold).correct == right


# --- Files ---


@pytest.mark.parametrize("line", ['{"a": 1, "b": 2, "a": 3}', '{"b": [{"a": 1, "a": 1}]}'])
def test_a_key_that_stands_twice_is_refused(tmp_path, line):
    (tmp_path / "lines.jsonl").write_text(f"{{}}\n{line}\n")
    with pytest.raises(UserError, match="line 2: not valid JSON: the key 'a' stands twice in one object"):
        list(read_jsonl(tmp_path / "lines.jsonl"))


def test_lines_end_where_json_lines_end_them(tmp_path):
    """Not at the separators of Unicode that Python's splitlines knows; a byte order mark is passed over."""
    text = "a\u2028b\u2029c\x85d\x0be"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for _ in range(2)]
    (tmp_path / "lines.jsonl").write_text("\r\n".join(lines), encoding="utf-8-sig", newline="")
    assert [record["text"] for _, record in read_jsonl(tmp_path / "lines.jsonl")] == [text, text]
    (tmp_path / "joined.jsonl").write_bytes(b'{"a": 1}\n\xef\xbb\xbf{"a": 2}\n')
    with pytest.raises(UserError, match="joined.jsonl, line 2: not valid JSON: Unexpected UTF-8 BOM"):
        list(read_jsonl(tmp_path / "joined.jsonl"))


# --- Chat templates ---


def test_a_template_that_takes_no_system_prompt_says_so(tokenizer):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1?"}]
    with pytest.raises(UserError, match=r"fails on the messages \[.*Be brief.*: .*System role not supported"):
        encode_chats(tokenizer, [chat], template)


def test_a_prompt_whose_last_space_joins_the_solution_is_refused(tmp_path):
    """In a tokenizer of merges, ` 4` is one token: prompt and whole conversation part at the space."""
    tokenizer = load_tokenizer("testbed")
    template = "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST] ' if m['role'] == 'user' "
    template += "else m['content'] + eos_token }}{% endfor %}"
    line = {"messages": [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "Nina has 2"}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(line) + "\n")
    task = load_task("chats", str(tmp_path / "chats.jsonl"))
    with pytest.raises(UserError, match="begins with 'Nina has 2', which the tokenizer joins to the end of the prompt"):
        tokenize_solutions(task, task.problems("test"), tokenizer, template, [tokenizer.eos_token_id])


# --- Decoding ---


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> str:
    """A System 1 that embeds 300 tokens more than its tokenizer knows, as Qwen's do, and likes all tokens alike."""
    folder, tokenizer = tmp_path_factory.mktemp("wide"), tiny_tokenizer()
    tokenizer.chat_template = LLAMA3_PLAIN
    tokenizer.save_pretrained(folder)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tiny_system1(vocab_size=len(tokenizer) + 300, initializer_range=0.02, **special).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("negatives", ["explored", "sampled", "plausible"])
def test_tokens_that_the_tokenizer_does_not_know_are_never_negatives(wide, tmp_path, negatives):
    line = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "It is 5."}], "answer": 5}
    (tmp_path / "chats.jsonl").write_text(json.dumps(line) + "\n")
    output = tmp_path / "triplets.jsonl"
    data = {"task": "chats", "data_file": str(tmp_path / "chats.jsonl"), "output": str(output)}
    limits = {"max_new_tokens": 2, "gold_rollouts": 2, "max_rollouts": 2, "top_k": 30, "quality_margin": 0.0}
    explore(ExploreConfig(model=wide, device="cpu", negatives=negatives, **data, **limits))
    if any(json.loads(line)["samples"] for line in output.read_text().splitlines()):
        load_examples(output, load_tokenizer(wide))  # refuses ids that the tokenizer does not know
    else:
        assert negatives == "explored"  # none of its rollouts is right


def test_the_streamed_text_is_the_decoded_one(wide):
    """A token is a byte here: most characters come in parts."""
    llm2 = LLM2.from_pretrained(wide, device="cpu")
    ids = llm2.tokenizer("Wie viele Äpfel? 几个", return_tensors="pt")["input_ids"]
    streamer = TextIteratorStreamer(llm2.tokenizer, skip_prompt=True)
    sequences = llm2.generate(ids, max_new_tokens=40, streamer=streamer)
    assert "".join(streamer) == llm2.tokenizer.decode(sequences[0, ids.shape[1] :])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_seen_nor_penalised(system1, tokenizer, side):
    """Also where the padding is a token that the model likes to write."""
    llm2 = LLM2(tiny_system1(vocab_size=len(tokenizer)), tokenizer)
    ids = tokenizer("How many", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 8, "repetition_penalty": 3.0}
    alone = llm2.generate(ids, **options)[0, ids.shape[1] :].tolist()
    padding, seen = torch.full((1, 5), alone[0]), torch.ones_like(ids)
    parts = [(padding, torch.zeros_like(padding)), (ids, seen)][:: 1 if side == "left" else -1]
    padded, mask = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    assert llm2.generate(padded, attention_mask=mask, **options)[0, padded.shape[1] :].tolist() == alone


def test_stop_strings_of_one_character_and_such_that_never_come(system1, tokenizer):
    llm2 = LLM2(tiny_system1(vocab_size=len(tokenizer)), tokenizer)
    ids = tokenizer("How many", return_tensors="pt")["input_ids"]
    whole = llm2.generate(ids, max_new_tokens=20)[0].tolist()
    ascii_token = next(i for i in range(ids.shape[1], len(whole)) if tokenizer.decode([whole[i]]).isascii())
    stop = tokenizer.decode([whole[ascii_token]])
    assert llm2.generate(ids, max_new_tokens=20, stop_strings=[stop])[0].tolist() == whole[: ascii_token + 1]
    assert llm2.generate(ids, max_new_tokens=20, stop_strings=["\n", "#### "])[0].tolist() == whole


def test_either_end_of_sequence_token_ends_a_text(tokenizer):
    """Those of the generation config, several or one, and the tokenizer's, which stands in no config here."""
    model = tiny_system1(vocab_size=len(tokenizer))
    ids = tokenizer("How many", return_tensors="pt")["input_ids"]
    model.generation_config.eos_token_id = None
    new = LLM2(model, tokenizer).generate(ids, max_new_tokens=8)[0, ids.shape[1] :].tolist()
    ended = copy.deepcopy(tokenizer)
    ended.eos_token = ended.convert_ids_to_tokens(new[4])
    for ends, expected in ((None, new[:5]), (new[2], new[:3]), ([new[6], new[1]], new[:2])):
        model.generation_config.eos_token_id = ends
        assert LLM2(model, ended).generate(ids, max_new_tokens=8)[0, ids.shape[1] :].tolist() == expected


@pytest.mark.parametrize("temperature", [1e-4, 1e-12, 1e-39])
def test_a_temperature_near_0_is_greedy(temperature):
    logits = torch.randn(50, 200, generator=torch.Generator().manual_seed(0)) * 5
    draws = sample(logits, SamplingParams(temperature=temperature), torch.rand(50))
    assert torch.equal(draws, logits.argmax(-1))


# --- Training ---


def test_an_embedding_is_no_target_of_lora(tmp_path):
    tiny_system1(tie_word_embeddings=True).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"the LoRA targets \['embed_tokens'\] hold an embedding; expected linear"):
        spec = VerifierSpec(kind="prefix_lora", lora_target_modules=("embed_tokens",))
        ProcessVerifier.from_system1(str(tmp_path), spec)
