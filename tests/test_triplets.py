"""The data format: valid lines are accepted, others are refused with an error that names the cause."""

import json
import tracemalloc

import pytest

from llm2.common.chat import LLAMA3_PLAIN, encode_chats
from llm2.errors import UserError
from llm2.verifier import triplets
from llm2.verifier.pair_metrics import pair_info
from llm2.verifier.triplets import Example, Triplet, load_examples, read_records, record_line

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
        ("[]", "line 2: expected an object, found a list"),
        ('{"messages": []}', "line 2: expected the key 'samples' with a list"),
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


def test_a_triplet_in_the_question_is_refused(seed_record, tokenizer):
    path, ids, samples = seed_record
    start = len(encode_chats(tokenizer, [MESSAGES[:1]], LLAMA3_PLAIN, generation_prompt=True)[0])
    for position in (start - 1, start - 20):
        path.write_text(record_line(MESSAGES, [*samples, Triplet(position, ids[position], 5)]))
        with pytest.raises(UserError, match=f"line 1, position {position}: the token is in the question, .* {start}$"):
            load_examples(path, tokenizer, LLAMA3_PLAIN)
    path.write_text(record_line(MESSAGES, [Triplet(start, ids[start], 5)]))
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


def test_examples_come_back_from_disk_as_they_were(tokenizer, tmp_path):
    """Two lines, the second one without the quality of its tokens; the solution begins behind the prompt."""
    ids = encode_chats(tokenizer, [MESSAGES], LLAMA3_PLAIN)[0]
    start = len(encode_chats(tokenizer, [MESSAGES[:1]], LLAMA3_PLAIN, generation_prompt=True)[0])
    solution = [Triplet(start + i, ids[start + i], 5) for i in (0, 3, 3)]
    path = tmp_path / "two.jsonl"
    quality = [[1.0, 0.25], [0.5, 0.5], [0.5, 0.625]]
    path.write_text(record_line(MESSAGES, solution, quality=quality) + record_line(MESSAGES, solution[:1]))
    examples, _ = load_examples(path, tokenizer, LLAMA3_PLAIN)
    assert list(examples) == [
        Example(ids, solution, start, first_pair_id=0, quality_gaps=[0.75, 0.0, -0.125], gold_better=[], line=1),
        Example(ids, solution[:1], start, first_pair_id=3, quality_gaps=[], gold_better=[], line=2),
    ]


def test_pairs_beyond_max_length_are_dropped_and_counted(tokenizer, tmp_path):
    ids = encode_chats(tokenizer, [MESSAGES], LLAMA3_PLAIN)[0]
    near, far = (Triplet(p, ids[p], ids[p] ^ 1) for p in (110, 130))
    path = tmp_path / "three.jsonl"
    lines = [([near, far], [[1.0, 0.0], [1.0, 0.5]]), ([far], [[1.0, 0.0]]), ([near], [[1.0, 0.25]])]
    path.write_text("".join(record_line(MESSAGES, t, quality=q) for t, q in lines))
    examples, summary = load_examples(path, tokenizer, LLAMA3_PLAIN, max_length=130)
    assert [example.ids for example in examples] == [ids[:130], ids[:130]]
    assert [(example.triplets, example.quality_gaps) for example in examples] == [([near], [1.0]), ([near], [0.75])]
    assert [example.first_pair_id for example in examples] == [0, 1]
    assert (summary.lines, summary.triplets, summary.dropped, summary.emptied) == (3, 4, 2, 1)
    with pytest.raises(UserError, match="expected triplets before max_length 110"):
        load_examples(path, tokenizer, LLAMA3_PLAIN, max_length=110)


def test_the_table_shows_lengths_pairs_and_duplicates(seed_record, tokenizer):
    path, ids, _ = seed_record
    path.write_text(path.read_text() * 3)
    _, summary = load_examples(path, tokenizer, LLAMA3_PLAIN)
    rows = {line[:20].strip(): line[20:].split() for line in summary.table().splitlines()}
    assert rows["tokens a solution"] == [str(len(ids))] * 4 and rows["pairs a solution"] == ["2"] * 4
    assert rows["duplicate pairs"] == ["3"] and rows["pairs dropped"] == ["0"]


@pytest.mark.parametrize("quality", [None, [[1.0, 0.0]], [1.0, 0.0], "good"])
def test_quality_weights_need_the_quality_of_each_pair(seed_record, tokenizer, quality):
    """The file has two triplets a line. Without quality weights the key is ignored."""
    path, _, _ = seed_record
    record = json.loads(path.read_text()) | {"quality": quality}
    path.write_text(json.dumps(record))
    load_examples(path, tokenizer, LLAMA3_PLAIN)
    with pytest.raises(UserError, match="line 1: key 'quality'"):
        load_examples(path, tokenizer, LLAMA3_PLAIN, quality=True)


def test_memory_does_not_grow_with_the_file(seed_record, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(triplets, "TOKENIZED_LINES", 50)
    path, _, _ = seed_record
    line = path.read_text()

    def peak_memory(lines: int) -> int:
        many = tmp_path / f"{lines}.jsonl"
        many.write_text(line * lines)
        tracemalloc.start()
        load_examples(many, tokenizer, LLAMA3_PLAIN)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_memory(200)  # imports and caches
    assert peak_memory(1_600) < 1.2 * peak_memory(400), "four times the lines"


def verdict(triplet: Triplet, gold: list[int], token: list[int]) -> dict:
    return {"triplet": list(triplet), "verdict": "undecided", "gold": gold, "token": token, "probability": 0.2}


def test_an_explorations_verdicts_are_read_with_soft_targets(tokenizer, tmp_path):
    """Ties and undecided tokens included; a token without rollouts says nothing."""
    ids = encode_chats(tokenizer, [MESSAGES], LLAMA3_PLAIN)[0]
    worse, tie, unknown = (Triplet(i, ids[i], ids[i] ^ 1) for i in range(110, 113))
    pairs = [verdict(worse, [10, 10], [0, 6]), verdict(tie, [5, 10], [4, 8]), verdict(unknown, [0, 10], [0, 0])]
    path = tmp_path / "triplets.jsonl.pairs.jsonl"
    path.write_text(json.dumps({"id": "a", "messages": MESSAGES, "pairs": pairs}) + "\n")
    examples, summary = load_examples(path, tokenizer, LLAMA3_PLAIN)
    assert examples[0].triplets == [worse, tie] and summary.triplets == 2
    assert examples[0].gold_better[0] > 0.999 and examples[0].gold_better[1] == pytest.approx(0.5, abs=0.01)
    assert examples[0].quality_gaps == [1.0, 0.0]
    assert list(pair_info(examples, tokenizer)) == [0]  # the tie is no held-out pair


def test_an_ill_formed_verdict_is_named(tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES, "pairs": [{"triplet": [1, 2, 3], "gold": 1}]}) + "\n")
    with pytest.raises(UserError, match="pairs.jsonl, line 1: key 'pairs'"):
        load_examples(path, tokenizer, LLAMA3_PLAIN)
