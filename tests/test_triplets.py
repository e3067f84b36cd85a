"""The data format: what is accepted, what is refused, and in which words."""

import json

import pytest

from llm2.chat import LLAMA3_PLAIN, encode_chats
from llm2.errors import UserError
from llm2.triplets import Triplet, load_examples, read_records, record_line

MESSAGES = [
    {"role": "user", "content": "Natalia sold clips to 48 of her friends in April, and then half as many in May."},
    {"role": "assistant", "content": "Natalia sold 48 / 2 = 24 clips in May. So the answer is 72."},
]
WITH_PREAMBLE = LLAMA3_PLAIN.replace(
    "{{ bos_token }}",
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024<|eot_id|>' }}",
)


@pytest.fixture
def seed_record(tokenizer, tmp_path):
    """A line as the published files have it: positions after the plain Llama-3 template, duplicates allowed."""
    ids = encode_chats(tokenizer, [MESSAGES], LLAMA3_PLAIN)[0]
    slash = (
        len(
            encode_chats(
                tokenizer, [[MESSAGES[0], {"role": "assistant", "content": "Natalia sold 48 "}]], LLAMA3_PLAIN
            )[0]
        )
        - 1
    )
    star, slash_id = tokenizer("*")["input_ids"][0], tokenizer("/")["input_ids"][0]
    assert ids[slash] == slash_id
    samples = [Triplet(slash, slash_id, star), Triplet(slash, slash_id, star)]
    path = tmp_path / "seed.jsonl"
    path.write_text(record_line(MESSAGES, samples))
    return path, ids, samples


def test_the_seed_record_is_accepted_with_its_template(seed_record, tokenizer):
    path, ids, samples = seed_record
    (example,), summary = load_examples(path, tokenizer, LLAMA3_PLAIN)
    assert example.ids == ids and example.triplets == samples
    assert (summary.lines, summary.triplets, summary.duplicates) == (1, 2, 1)


def test_a_template_with_a_preamble_is_refused_and_named_as_the_cause(seed_record, tokenizer):
    path, ids, samples = seed_record
    shift = len(encode_chats(tokenizer, [MESSAGES], WITH_PREAMBLE)[0]) - len(ids)
    with pytest.raises(UserError) as refusal:
        load_examples(path, tokenizer, WITH_PREAMBLE)
    text = str(refusal.value)
    assert f"line 1, position {samples[0].position}: expected token {samples[0].gold} '/', found" in text
    assert f"the chat template writes {shift} tokens more" in text and "llama3-plain" in text


def test_what_is_written_is_read_back_and_unknown_keys_are_ignored(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(record_line(MESSAGES, [Triplet(3, 4, 5)], quality=[[1.0, 0.0]]) + "\n")
    (record,) = read_records(path)
    assert record.messages == MESSAGES and record.triplets == [(3, 4, 5)] and record.line == 1


@pytest.mark.parametrize(
    "line, expected",
    [
        ("{", "line 2: not valid JSON"),
        ("[]", "line 2: expected an object with the key 'messages'"),
        ('{"messages": []}', "line 2: expected an object with the key 'samples'"),
        ('{"messages": [{"role": "user"}], "samples": []}', "line 2: key 'messages'"),
        ('{"messages": [], "samples": [[1, 2]]}', "line 2: key 'samples': expected [position, gold"),
        ('{"messages": [], "samples": [[1, 2, "3"]]}', "found [1, 2, '3']"),
        ('{"messages": [], "samples": [[1, 2, true]]}', "found [1, 2, True]"),
    ],
)
def test_a_line_out_of_format_is_named(tmp_path, line, expected):
    path = tmp_path / "bad.jsonl"
    path.write_text(record_line(MESSAGES, []) + line + "\n")
    with pytest.raises(UserError) as refusal:
        list(read_records(path))
    assert expected in str(refusal.value) and str(path) in str(refusal.value)


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda p, g, n: (p, g, 10**6), "negative token 1000000 is not in the vocabulary"),
        (lambda p, g, n: (p, g, g), "gold and negative are the same token"),
        (lambda p, g, n: (10**4, g, n), "but the line has only"),
        (lambda p, g, n: (p - 1, g, n), "expected token"),
        (lambda p, g, n: (p, 10**6, n), "1000000 (outside the vocabulary)"),
    ],
)
def test_a_triplet_that_does_not_fit_is_named(seed_record, tokenizer, change, expected):
    path, _, samples = seed_record
    record = json.loads(path.read_text())
    record["samples"].append(list(change(*samples[0])))
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=expected.replace("(", r"\(").replace(")", r"\)")):
        load_examples(path, tokenizer, LLAMA3_PLAIN)


def test_a_missing_file_and_an_empty_one_are_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match="cannot read the triplets"):
        list(read_records(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="at least one triplet"):
        load_examples(tmp_path / "empty.jsonl", tokenizer, LLAMA3_PLAIN)


def test_a_tokenizer_without_template_asks_for_one(seed_record, tokenizer):
    with pytest.raises(UserError, match="has no chat template of its own"):
        load_examples(seed_record[0], tokenizer)
