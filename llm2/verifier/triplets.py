"""The data format: JSON lines of `messages` and `samples`, a list of [position, gold token id, negative token id].

Reads it, holds every position against a tokenizer and a chat template, writes it. What leaves `load_examples` is token
ids and triplets that fit each other, on disk and not in memory. Knows nothing of verifiers.
"""

import json
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from llm2.common.chat import Message, encode_chats
from llm2.errors import UserError

CHUNK = 250  # lines tokenized at a time: fast in the tokenizer, flat in memory
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
    gaps: list[float] | None = None  # of each triplet gold's quality less the negative's, where the line tells it


class Example(NamedTuple):
    """A record after tokenization."""

    ids: list[int]
    triplets: list[Triplet]
    start: int = 0  # position of the first token of the solution, behind the prompt
    number: int = 0  # of its first triplet, counted through the whole file
    gaps: Sequence[float] = ()  # one a triplet where the file tells quality


class ExampleFile(Sequence[Example]):
    """Examples in a file that has no name and vanishes with this object, so that memory does not grow with the data."""

    ROW = 4  # numbers of a triplet: position, gold, negative, and its gap as the bits of a float32

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (it lives as long as this object)
        self._index = array("q")  # of each example: its place in the file, tokens, triplets, start, number, gaps
        self._numbers = self._place = 0

    def append(self, ids: Sequence[int], triplets: Sequence[Triplet], start: int, gaps: Sequence[float]) -> None:
        table = np.zeros((len(triplets), self.ROW), dtype=np.int32)
        table[:, :3] = np.array(triplets, dtype=np.int32).reshape(-1, 3)
        table[: len(gaps), 3] = np.array(gaps, dtype=np.float32).view(np.int32)
        self._file.write(np.array(ids, dtype=np.int32).tobytes() + table.tobytes())
        self._index.extend([self._place, len(ids), len(triplets), start, self._numbers, len(gaps)])
        self._place += len(ids) + self.ROW * len(triplets)
        self._numbers += len(triplets)

    def __len__(self) -> int:
        return len(self._index) // 6

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place, tokens, triplets, start, number, gaps = self._index[6 * index : 6 * index + 6]
        length = 4 * (tokens + self.ROW * triplets)
        values = np.frombuffer(os.pread(self._file.fileno(), length, 4 * place), dtype=np.int32)
        table = values[tokens:].reshape(-1, self.ROW)
        return Example(
            values[:tokens].tolist(),
            [Triplet(*row) for row in table[:, :3].tolist()],
            start,
            number,
            table[:gaps, 3].copy().view(np.float32).tolist(),
        )


@dataclass
class Summary:
    """What a file holds, before anything is cut off."""

    lines: int = 0
    triplets: int = 0
    duplicates: int = 0  # triplets that repeat one of the same line
    dropped: int = 0  # triplets at or beyond max_length
    emptied: int = 0  # lines without a triplet, or without one before max_length: nothing to train on
    lengths: Counter = field(default_factory=Counter)  # tokens of a line -> lines
    pairs: Counter = field(default_factory=Counter)  # triplets of a line -> lines

    def add(self, ids: Sequence[int], triplets: Sequence[Triplet], kept: int) -> None:
        self.lines += 1
        self.triplets += len(triplets)
        self.duplicates += len(triplets) - len(set(triplets))
        self.dropped += len(triplets) - kept
        self.emptied += kept == 0
        self.lengths[len(ids)] += 1
        self.pairs[len(triplets)] += 1

    def __str__(self) -> str:
        return f"{self.lines:,} solutions, {self.triplets:,} triplets ({self.duplicates:,} duplicates)"

    def table(self) -> str:
        """Lengths, pairs and what is left out, for a person to read."""
        header = f"{'':>20}{'min':>9}{'median':>9}{'mean':>9}{'max':>9}"
        rows = [("tokens a solution", self.lengths), ("pairs a solution", self.pairs)]
        counts = [
            ("duplicate pairs", self.duplicates),
            ("pairs dropped", self.dropped),
            ("solutions left out", self.emptied),
        ]
        return "\n".join(
            [
                header,
                *(f"{name:>20}" + "".join(f"{value:>9,.4g}" for value in _spread(counter)) for name, counter in rows),
                *(f"{name:>20}{count:>9,}" for name, count in counts),
            ]
        )


def _spread(values: Counter) -> tuple[float, float, float, float]:
    """Smallest, median, mean and largest of counted values."""
    total, seen = values.total(), 0
    for median in sorted(values):
        seen += values[median]
        if 2 * seen >= total:
            break
    return min(values), median, sum(value * count for value, count in values.items()) / total, max(values)


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
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    *,
    max_length: int | None = None,
    quality: bool = False,
) -> tuple[ExampleFile, Summary]:
    """Read, tokenize and check a file; every position of every line, before anything is trained on it.

    Args:
        max_length: cut lines to so many tokens; a triplet beyond the cut goes, and so does a line without triplets.
            Both are counted.
        quality: ask for the quality of each triplet's tokens.

    Raises UserError with the first misfits: line, position, expected and found token, and the likely cause.
    """
    examples, summary, misfits = ExampleFile(), Summary(), []
    for record, ids, start in _tokenized(path, tokenizer, template):
        misfit = find_misfit(ids, record.triplets, len(tokenizer))
        if misfit is not None:
            misfits.append((record, ids, misfit))
            if len(misfits) == SHOWN:
                break
            continue
        if quality and record.gaps is None:
            raise UserError(
                f"{path}, line {record.line}: key 'quality': expected [gold's, negative's] for each of the samples, "
                "by which pairs are to be weighted, found none"
            )
        kept = [i for i, t in enumerate(record.triplets) if max_length is None or t.position < max_length]
        summary.add(ids, record.triplets, len(kept))
        if kept:
            gaps = [record.gaps[i] for i in kept] if record.gaps is not None else []
            examples.append(ids[:max_length], [record.triplets[i] for i in kept], start, gaps)
    if misfits:
        raise UserError(_refusal(path, tokenizer, misfits))
    if not summary.triplets:
        raise UserError(f"{path}: expected at least one triplet, found none in {summary.lines} lines")
    if not examples:
        raise UserError(f"{path}: expected triplets before max_length {max_length}, found all of them beyond it")
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
    triplets = [Triplet(*sample) for sample in record["samples"]]
    return Record(record["messages"], triplets, number, _gaps(record.get("quality"), len(triplets)))


def _gaps(quality: Any, triplets: int) -> list[float] | None:
    """By how much gold is better, a triplet each, from what exploration writes: gold's and the negative's quality."""
    if not isinstance(quality, list) or len(quality) != triplets:
        return None
    for pair in quality:
        if not isinstance(pair, list) or len(pair) != 2 or any(type(share) not in (int, float) for share in pair):
            return None
    return [gold - negative for gold, negative in quality]


def _tokenized(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, template: str | None
) -> Iterator[tuple[Record, list[int], int]]:
    """Each record with its token ids and the position where its last message, the solution, begins."""
    records = read_records(path)
    while chunk := list(islice(records, CHUNK)):
        whole = encode_chats(tokenizer, [record.messages for record in chunk], template)
        asked = [record.messages[:-1] for record in chunk]
        prompts = iter(encode_chats(tokenizer, [messages for messages in asked if messages], template, True))
        for record, ids, messages in zip(chunk, whole, asked, strict=True):
            yield record, ids, _common(ids, next(prompts)) if messages else 0


def _common(ids: Sequence[int], prompt: Sequence[int]) -> int:
    """Length of the common beginning: a template may write less before a solution than before one to come."""
    return next((i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), min(len(ids), len(prompt)))


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
