"""Fuzzing: for any input a reader gives the content or one UserError, and the decoder what its slow twin gives."""

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from experiments.commands import CONFIGS
from experiments.study.config import StudyConfig
from experiments.testbed.config import GenerateConfig
from llm2.common.chat import LLAMA3_PLAIN, encode_chats
from llm2.common.config_file import load_config, write_config
from llm2.common.journal import Journal
from llm2.errors import UserError
from llm2.evaluation.report import read_metrics, table
from llm2.evaluation.report.pack import pack
from llm2.evaluation.report.plots import figures
from llm2.tasks.grading import LONGEST_NUMBER, extract_answer, grade_numbers, is_correct
from llm2.verifier.triplets import load_examples
from tests.conftest import tiny_tokenizer
from tests.robustness.property import Property, fuzz
from tests.robustness.row import Row
from tests.test_report import METRICS


def run(folder: Path, scale: float) -> list[Row]:
    from tests.robustness.fuzz_decoder import PROPERTY  # its import loads models

    return [fuzz(each, folder / str(index), scale) for index, each in enumerate([*PROPERTIES, PROPERTY])]


# --- Inputs ---

TEXT = st.text(max_size=20) | st.text("#$,.-/0123456789 \\\n{}[]:=abcerxNaN\ud800\u0000\u0663\ufeff", max_size=20)
NUMBERS = st.integers() | st.integers(-3, 300) | st.floats() | st.sampled_from([10**400, -(2**63), 2**31, 1e308])
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=6,
)


def paths(value: Any, path: tuple = ()) -> list[tuple]:
    """Where the nodes of a JSON value are."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(each for key, inner in items for each in paths(inner, (*path, key)))]


def replaced(value: Any, path: tuple, new: Any) -> Any:
    """The value with another node at a path; with `...` as the new one, without that node."""
    if not path:
        return None if new is ... else new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    if new is ... and len(path) == 1:
        del copy[path[0]]
    return copy


@st.composite
def damaged_json(draw: st.DrawFn, value: Any, most: int = 2) -> Any:
    for _ in range(draw(st.integers(0, most))):
        path = draw(st.sampled_from(paths(value)))
        value = replaced(value, path, draw(st.just(...) | JSON_VALUES))
    return value


@dataclass(frozen=True)
class Damage:
    """What happens to a file; positions count modulo its length."""

    kind: str
    at: int
    length: int
    new: bytes

    def __call__(self, whole: bytes) -> bytes:
        at = self.at % (len(whole) + 1)
        if self.kind == "cut":
            return whole[:at]
        if self.kind == "flip":
            return whole[:at] + bytes(byte ^ self.new[0] for byte in whole[at : at + 1]) + whole[at + 1 :]
        end = min(len(whole), at + self.length)
        new = {"insert": self.new, "zeros": b"\0" * (end - at), "delete": b""}[self.kind]
        return whole[:at] + new + whole[at if self.kind == "insert" else end :]


DAMAGE = st.builds(
    Damage,
    st.sampled_from(["cut", "flip", "insert", "zeros", "delete"]),
    st.integers(0, 2_000),
    st.integers(1, 40),
    st.binary(min_size=1, max_size=8),
)


def lines(records: Sequence[Any], ascii_only: bool) -> bytes:
    return "".join(json.dumps(each, ensure_ascii=ascii_only) + "\n" for each in records).encode(errors="surrogatepass")


def one_sentence(error: UserError, names: str = "") -> None:
    assert str(error).strip() and names in str(error), f"a UserError without the file: {error}"


# --- The config reader ---

CLASSES = {**CONFIGS, "study": StudyConfig}
REQUIRED = {"model": "m", "output": "o", "output_dir": "o", "task": "testbed", "train_file": "t", "verifier": "v"}
YAML_PIECES = [
    "!!int x",
    "!!float x",
    "!!timestamp x",
    "!!binary é",
    "!!set {a}",
    "!!python/name:os.system",
    "0b_",
    "0x_",
]
YAML_PIECES += [
    "2001-99-99",
    "&a [*a]",
    "&a {b: *a}",
    "1" * 5_000,
    "[" * 2_000,
    "{a: b}: c",
    "[a]: b",
    "<<: 5",
    "1:99:99",
]
YAML_PIECES += [
    ".nan",
    "-.inf",
    "1e999",
    "? ",
    "- ",
    "---\n",
    "%YAML 9\n",
    "\t",
    "|\n a",
    "!x y",
    "*b",
    "\ufeff",
    "\x85",
    "1_0",
]


@st.composite
def configs(draw: st.DrawFn) -> tuple[type, bytes, list[str]]:
    """A command's config class, a file, and overrides."""
    cls = CLASSES[draw(st.sampled_from(sorted(CLASSES)))]
    fields = sorted(cls.__dataclass_fields__)
    key = st.sampled_from(fields) | st.sampled_from(fields) | TEXT | st.integers()
    required = {name: REQUIRED[name] for name in fields if name in REQUIRED}
    kind = draw(st.sampled_from(["values", "pieces", "noise"]))
    if kind == "values":
        text = yaml.safe_dump(
            required | draw(st.dictionaries(key, JSON_VALUES, max_size=3)), allow_unicode=draw(st.booleans())
        )
    elif kind == "pieces":
        pieces = draw(st.dictionaries(st.sampled_from(fields), st.sampled_from(YAML_PIECES), min_size=1, max_size=2))
        text = "\n".join(f"{name}: {value}" for name, value in (required | pieces).items())
    else:
        piece = (
            st.sampled_from(YAML_PIECES)
            | st.sampled_from(fields)
            | st.text("{}[]:,-?&*!|>'\"%@` \n\t#ab10.", max_size=9)
        )
        pairs = st.tuples(key.map(str), piece).map(": ".join)
        text = "\n".join(draw(st.lists(pairs | piece | TEXT, max_size=5)))
    content = text.encode(errors="surrogatepass")
    if draw(st.booleans()):
        content = draw(DAMAGE)(content)
    override = st.tuples(key.map(str), st.sampled_from(["=", "", "=="]), TEXT | st.sampled_from(YAML_PIECES))
    return cls, content, draw(st.lists(override.map("".join), max_size=2))


def check_config(value: tuple[type, bytes, list[str]], folder: Path) -> None:
    cls, content, overrides = value
    path = folder / "config.yaml"
    path.write_bytes(content)
    try:
        config = load_config(cls, path, overrides)
    except UserError as error:
        one_sentence(error, "" if overrides else str(path))
        assert "\n" not in str(error)
        return
    write_config(config, folder / "written.yaml")
    assert load_config(cls, folder / "written.yaml") == config


# --- The reader of triplets ---

TOKENIZER = tiny_tokenizer()
TOKENIZER.chat_template = LLAMA3_PLAIN


@st.composite
def triplet_files(draw: st.DrawFn) -> tuple[bytes, dict[str, Any]]:
    """A file of right records, triplets or labelled steps, of which some are damaged, and options of the reader."""
    records, of_steps = [], draw(st.booleans())
    for question, answer in draw(st.lists(st.tuples(TEXT, st.text(min_size=1, max_size=9)), max_size=3)):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        (ids,) = encode_chats(TOKENIZER, [[{**m, "content": _plain(m["content"])} for m in messages]])
        positions = draw(st.lists(st.integers(1, len(ids) - 1), max_size=3))
        triplets = [[at, ids[at], (ids[at] + draw(st.integers(1, 5))) % len(TOKENIZER)] for at in positions]
        record = {"messages": messages, "samples": triplets, "quality": [[0.9, 0.1]] * len(triplets)}
        if draw(st.booleans()):
            pairs = [{"triplet": each, "verdict": "negative", "gold": [3, 4], "token": [1, 4]} for each in triplets]
            record = {"messages": messages, "samples": [], "pairs": pairs}
        if of_steps:
            record = {"prompt": question, "completions": [answer, question + "."], "labels": [True, False]}
        records.append(draw(damaged_json(record)))
    content = lines(records, draw(st.booleans()))
    if draw(st.booleans()):
        content = draw(DAMAGE)(content)
    return content, {"quality": draw(st.booleans()), "max_length": draw(st.none() | st.integers(1, 60))}


def _plain(text: str) -> str:
    return text.encode(errors="replace").decode()


def check_triplets(value: tuple[bytes, dict[str, Any]], folder: Path) -> None:
    content, options = value
    path = folder / "triplets.jsonl"
    path.write_bytes(content)
    try:
        examples, summary = load_examples(path, TOKENIZER, **options)
    except UserError as error:
        one_sentence(error, str(path))
        return
    assert 0 < len(examples) <= summary.lines <= content.count(b"\n") + 1
    for example in examples:
        assert example.triplets and len(example.ids) <= (options["max_length"] or 10**9)
        for (at, gold, negative), *soft in zip(example.triplets, example.gold_better, strict=False):
            assert example.ids[at] == gold != negative and -example.of_steps <= negative < len(TOKENIZER)
            assert all(0 <= each <= 1 for each in soft)
        assert all(-1 <= gap <= 1 for gap in example.quality_gaps)


# --- The grader ---

GRADED = [
    "#### ",
    "The answer is ",
    r"\boxed{",
    r"\frac{1}{2}",
    "-",
    "\u2212",
    "$",
    ",",
    ".",
    "/",
    " / ",
    "=",
    "}",
    "\n",
]
GRADED += [
    "</think>",
    "Question:",
    "\nProblem 2:",
    "Answer: ",
    "final answer",
    "\\text{",
    "e-5",
    "\u2013",
    "£",
    "**",
    "because",
    "1,000",
    "0.50",
    r"\!",
    "{,}",
    "7",
    "12",
    "9" * 60,
    "/0",
    "²",
    "\u0663",
]
SOLUTIONS = st.tuples(
    st.lists(st.sampled_from(GRADED) | TEXT, max_size=12).map("".join), st.sampled_from([1, 1, 1, 900])
)


def check_grader(value: tuple[str, int], folder: Path) -> None:
    text = value[0] * value[1]
    answers = {mode: extract_answer(text, mode) for mode in ("flexible", "strict")}
    for answer in filter(None, answers.values()):
        assert set(answer) <= set(string.digits + "-./"), answer
        if len(answer) <= LONGEST_NUMBER:
            assert extract_answer(answer) == extract_answer(f"#### {answer}", "strict") == answer
        assert is_correct(f"so the answer is {text}", text) in (True, False)
    (grade,) = grade_numbers([text], text)
    assert grade.correct == (answers["flexible"] is not None) and grade.answer == answers["flexible"]
    assert grade.correct_strict == (answers["strict"] is not None and answers["strict"] == answers["flexible"])


# --- Recovery of the journal ---

PLAIN_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
ENTRIES = st.lists(st.recursive(PLAIN_TEXT | st.integers(), st.lists, max_leaves=4), max_size=5)
JOURNAL_CONFIG = GenerateConfig(output="o")


def open_journal(folder: Path, shard: int = 0) -> Journal:
    return Journal(folder, JOURNAL_CONFIG, {}, key=lambda entry: entry["id"], shard=shard)


def check_journal(value: tuple[list, Damage], folder: Path) -> None:
    contents, damage = value
    entries = [{"id": number, "content": content} for number, content in enumerate(contents)]
    path = folder / "shard-0.jsonl"
    path.unlink(missing_ok=True)
    journal = open_journal(folder)
    for entry in entries:
        journal.add(entry)
    journal.close()
    whole = path.read_bytes()
    left = damage(whole)
    path.write_bytes(left)
    try:
        journal = open_journal(folder)
    except UserError as error:
        one_sentence(error, path.name)
        assert damage.kind != "cut", "a cut is mended"
        return
    kept = sorted(journal.done)
    same = [json.dumps(entry) for entry in journal.read(kept)] == [json.dumps(entries[number]) for number in kept]
    assert same, "another entry"
    complete = range(max(whole[: len(left)].count(b"\n") - 1, 0))
    assert kept == list(complete) if damage.kind == "cut" else len(kept) >= len(entries) - 1, f"kept only {kept}"
    for entry in entries:
        if entry["id"] not in journal.done:
            journal.add(entry)
    journal.close()
    assert path.read_bytes() == whole


# --- The report's reader ---

CHOICE = {
    "at": 0,
    "candidates": [" a", "b"],
    "logprobs": [-0.1, -2.0],
    "scores": [0.5, 1.5],
    "chosen": 1,
    "changed": True,
}
TRACE = {"tokens": [" a", "b"], "scores": [0.5, 1.5], "choices": [CHOICE]}
SAMPLE = {"text": "x 7", "answer": "7", "correct": True, "correct_strict": False, "tokens": 2, "score": 0.5}
FOLDER = {
    "metrics.json": [METRICS],
    "predictions.jsonl": [
        {"id": "p0", "question": "q?", "gold": "7", "mode": mode, "samples": [SAMPLE, {**SAMPLE, "answer": None}]}
        for mode in METRICS["modes"]
    ],
    "traces.jsonl": [{"id": "p0", "mode": mode, "traces": [TRACE]} for mode in METRICS["modes"]],
}


CONTENTS = {name: lines(records, True) for name, records in FOLDER.items()}


@st.composite
def damaged_files(draw: st.DrawFn, names: Sequence[str] = tuple(FOLDER)) -> tuple[str, bytes]:
    """A file of a results folder, and what it holds instead."""
    name = draw(st.sampled_from(names))
    if draw(st.booleans()):
        return name, lines([draw(damaged_json(each, 1)) for each in FOLDER[name]], draw(st.booleans()))
    return name, draw(DAMAGE)(CONTENTS[name])


def check_report(value: tuple[str, bytes], folder: Path, plots: bool = False) -> None:
    for name, content in {**CONTENTS, value[0]: value[1]}.items():
        (folder / name).write_bytes(content)
    try:
        metrics = read_metrics(folder / "metrics.json")
        assert table(metrics)
        page, _ = pack(folder, metrics, 10**6)
        assert "<" not in page and "NaN" not in page, "not safe in a script element"
    except UserError as error:
        one_sentence(error, str(folder))
        assert value[1] != CONTENTS[value[0]], "refused as it was"
        return
    if plots:
        figures(metrics)


def check_plots(value: tuple[str, bytes], folder: Path) -> None:
    check_report(value, folder, plots=True)


PROPERTIES = [
    Property("config files and overrides", configs(), check_config, 30_000),
    Property("files of triplets", triplet_files(), check_triplets, 20_000),
    Property("solutions to grade", SOLUTIONS, check_grader, 30_000),
    Property("journals cut or damaged", st.tuples(ENTRIES, DAMAGE), check_journal, 15_000),
    Property("results folders damaged", damaged_files(), check_report, 15_000),
    Property("metrics damaged, plots drawn", damaged_files(["metrics.json"]), check_plots, 300),
]
