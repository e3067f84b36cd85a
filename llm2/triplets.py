"""The data format: JSON lines of `messages` and `samples`, a list of [position, gold token id, negative token id].

Reads it, holds every position against a tokenizer and a chat template, writes it. What leaves `load_examples` is token
ids and triplets that fit each other. Knows nothing of verifiers.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from llm2.chat import Message, encode_chats
from llm2.errors import UserError

CHUNK = 1_000  # lines tokenized at a time: fast in the tokenizer, flat in memory
SHOWN = 3  # mistakes that a refusal quotes


class Triplet(NamedTuple):
    position: int  # index into the token ids of the whole conversation, without a generation prompt
    gold: int  # token id; ids[position] == gold
    negative: int  # token id of low quality at the same position


@dataclass(frozen=True)
class Record:
    """One line: a gold conversation and the triplets along it."""

    messages: list[Message]
    triplets: list[Triplet]
    line: int  # of the file, from 1


class Example(NamedTuple):
    """A record after tokenization."""

    ids: list[int]
    triplets: list[Triplet]


@dataclass
class Summary:
    """What a file holds."""

    lines: int = 0
    triplets: int = 0
    duplicates: int = 0  # triplets that repeat one of the same line
    tokens: int = 0
    longest: int = 0  # tokens

    def add(self, example: Example) -> None:
        self.lines += 1
        self.triplets += len(example.triplets)
        self.duplicates += sum(count - 1 for count in Counter(example.triplets).values())
        self.tokens += len(example.ids)
        self.longest = max(self.longest, len(example.ids))

    def __str__(self) -> str:
        pairs = self.triplets / max(self.lines, 1)
        length = self.tokens / max(self.lines, 1)
        return (
            f"{self.lines} solutions, {self.triplets} triplets ({pairs:.1f} a solution, {self.duplicates} duplicates), "
            f"{length:.0f} tokens a solution, longest {self.longest}"
        )


def read_records(path: str | Path) -> Iterator[Record]:
    """Every line that is not blank, in order. Keys other than `messages` and `samples` are ignored.

    Raises UserError at the first line that does not have the format.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield _parse(text, number, f"{path}, line {number}")
    except OSError as error:
        raise UserError(f"cannot read the triplets {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the triplets {path}: expected UTF-8, found {error.reason}") from None


def load_examples(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, template: str | None = None
) -> tuple[list[Example], Summary]:
    """Read, tokenize and check a file; every position of every line, before anything is trained on it.

    Raises UserError with the first misfits: line, position, expected and found token, and the likely cause.
    """
    examples, summary, misfits = [], Summary(), []
    for record, ids in _tokenized(path, tokenizer, template):
        misfit = find_misfit(ids, record.triplets, len(tokenizer))
        if misfit is not None:
            misfits.append((record, ids, misfit))
            if len(misfits) == SHOWN:
                break
        else:
            examples.append(Example(ids, record.triplets))
            summary.add(examples[-1])
    if misfits:
        raise UserError(_refusal(path, tokenizer, misfits))
    if not summary.triplets:
        raise UserError(f"{path}: expected at least one triplet, found none in {summary.lines} lines")
    return examples, summary


def find_misfit(ids: Sequence[int], triplets: Iterable[Triplet], vocabulary: int) -> Triplet | None:
    """The first triplet that does not belong to these ids."""
    for triplet in triplets:
        position, gold, negative = triplet
        if not 0 < position < len(ids) or ids[position] != gold or not 0 <= negative < vocabulary or negative == gold:
            return triplet
    return None


def record_line(messages: Sequence[Message], triplets: Iterable[Triplet], **extra: Any) -> str:
    """One line of the format, newline included; `extra` keys ride along for readers who know them."""
    record = {"messages": list(messages), "samples": [list(triplet) for triplet in triplets], **extra}
    return json.dumps(record, ensure_ascii=False) + "\n"


def _parse(text: str, number: int, where: str) -> Record:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    for key in ("messages", "samples"):
        if not isinstance(record, dict) or not isinstance(record.get(key), list):
            raise UserError(f"{where}: expected an object with the key {key!r} that holds a list")
    for message in record["messages"]:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError(f"{where}: key 'messages': expected objects with 'role' and 'content', found {message!r}")
    for sample in record["samples"]:
        if not isinstance(sample, list) or len(sample) != 3 or any(type(number) is not int for number in sample):
            raise UserError(
                f"{where}: key 'samples': expected [position, gold_token_id, negative_token_id], found {sample!r}"
            )
    return Record(record["messages"], [Triplet(*sample) for sample in record["samples"]], number)


def _tokenized(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, template: str | None
) -> Iterator[tuple[Record, list[int]]]:
    records = read_records(path)
    while chunk := list(islice(records, CHUNK)):
        yield from zip(chunk, encode_chats(tokenizer, [record.messages for record in chunk], template), strict=True)


def _refusal(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, misfits: list[tuple[Record, list[int], Triplet]]
) -> str:
    """What is wrong with the first misfits, and the cause where all of them have the same."""
    lines = [f"{path}: triplets do not fit the tokenizer {tokenizer.name_or_path} and its chat template:"]
    for record, ids, (position, gold, negative) in misfits:
        where = f"  line {record.line}, position {position}:"
        if not 0 <= negative < len(tokenizer):
            lines.append(f"{where} negative token {negative} is not in the vocabulary of {len(tokenizer)} tokens")
        elif negative == gold:
            lines.append(f"{where} gold and negative are the same token {_named(tokenizer, gold)}")
        elif not 0 < position < len(ids):
            lines.append(f"{where} expected token {_named(tokenizer, gold)}, but the line has only {len(ids)} tokens")
        else:
            expected, found = _named(tokenizer, gold), _named(tokenizer, ids[position])
            lines.append(f"{where} expected token {expected}, found {found}")
    shifts = {_shift(ids, record.triplets) for record, ids, _ in misfits}
    if len(shifts) == 1 and (shift := shifts.pop()):
        lines.append(
            f"  likely cause: the chat template writes {abs(shift)} tokens {'more' if shift > 0 else 'fewer'} before "
            "the solution than the one the triplets were made with (a system preamble or a date?); "
            "try the chat template llama3-plain or chatml-plain"
        )
    return "\n".join(lines)


def _shift(ids: list[int], triplets: list[Triplet]) -> int | None:
    """By how many tokens all golds of a line stand elsewhere, if one shift explains them all; the nearest one."""
    first = triplets[0]
    shifts = [index - first.position for index, token in enumerate(ids) if token == first.gold]
    for shift in sorted(shifts, key=abs):
        if all(t.position + shift < len(ids) and ids[t.position + shift] == t.gold for t in triplets):
            return shift
    return None


def _named(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    known = 0 <= token < len(tokenizer)
    return f"{token} {tokenizer.decode([token])!r}" if known else f"{token} (outside the vocabulary)"
