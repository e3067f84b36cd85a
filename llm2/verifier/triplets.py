"""The data format: JSON Lines of `messages` and `samples`, a list of [position, gold token id, negative token id].

The other format, of labelled steps (`steps.py`), becomes triplets of each step's last token and an absent one.

`load_examples` checks every position against a tokenizer and a chat template, and keeps tokenized examples on disk.
"""

import json
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import fmean, median_low
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from llm2.common.chat import Message, check_messages, encode_chats
from llm2.common.jsonl import read_jsonl
from llm2.common.prefix import common_prefix
from llm2.common.stats import probability_worse
from llm2.errors import UserError, quote
from llm2.verifier.steps import ABSENT, as_text, read_labels, read_steps, step_ends

TOKENIZED_LINES = 250  # lines tokenized at a time, so that memory does not grow with the file
MAX_MISFITS = 3  # quoted in an error
FORMATS = ("triplets", "labelled steps")


class Triplet(NamedTuple):
    """A gold token and a worse one at the same position of a conversation."""

    position: int  # index into the token ids of the whole conversation, without a generation prompt
    gold: int  # token id; ids[position] == gold
    negative: int  # token id of low quality at the same position, or ABSENT


@dataclass(frozen=True)
class Record:
    """One line: a gold conversation and the triplets along it."""

    messages: list[Message]
    triplets: list[Triplet]
    line: int  # of the file, from 1
    quality_gaps: list[float] | None = None  # (M,) gold's quality minus the negative's, if the line has `quality`
    gold_better: list[float] | None = None  # (M,) probability that gold's quality is higher; None: certain
    steps: list[str] | None = None  # labelled by gold_better, in place of triplets


class Example(NamedTuple):
    """A record after tokenization."""

    ids: list[int]
    triplets: list[Triplet]
    start: int = 0  # position of the solution's first token
    first_pair_id: int = 0  # pairs are numbered through the whole file
    quality_gaps: Sequence[float] = ()  # (M,), or empty where the file has no quality
    gold_better: Sequence[float] = ()  # (M,) soft targets, or empty if gold is certainly better
    line: int = 0  # of the file, from 1
    system1_margins: Sequence[float] = ()  # (M,) log p(gold) - log p(negative), or empty if the loss does not use it

    @property
    def of_steps(self) -> bool:
        return any(triplet.negative == ABSENT for triplet in self.triplets)


EMPTY_EXAMPLE = Example([0], [])  # without pairs: takes part in a forward and adds 0 to the loss


class ExampleFile(Sequence[Example]):
    """Examples in an anonymous temporary file, so that memory does not grow with the data."""

    VALUES = 8
    ROW = 5  # int32 values of a triplet: position, gold, negative, the bits of two float32: quality gap, gold_better

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (it lives as long as this object)
        # VALUES an example: offset, tokens, triplets, start, first_pair_id, quality gaps, soft targets, line
        self._index = array("q")
        self._offset = self._num_pairs = 0  # offsets are counted in int32 values
        self.of_steps: bool | None = None  # None while it is empty

    def append(
        self,
        ids: Sequence[int],
        triplets: Sequence[Triplet],
        start: int,
        gaps: Sequence[float],
        gold_better: Sequence[float] = (),
        line: int = 0,
    ) -> None:
        table = np.zeros((len(triplets), self.ROW), dtype=np.int32)
        table[:, :3] = np.array(triplets, dtype=np.int32).reshape(-1, 3)
        table[: len(gaps), 3] = np.array(gaps, dtype=np.float32).view(np.int32)
        table[: len(gold_better), 4] = np.array(gold_better, dtype=np.float32).view(np.int32)
        self._file.write(np.array(ids, dtype=np.int32).tobytes() + table.tobytes())
        numbers = [self._offset, len(ids), len(triplets), start, self._num_pairs, len(gaps), len(gold_better)]
        self._index.extend([*numbers, line])
        self._offset += len(ids) + self.ROW * len(triplets)
        self._num_pairs += len(triplets)

    def __len__(self) -> int:
        return len(self._index) // self.VALUES

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin = self.VALUES * index
        offset, tokens, triplets, start, first_pair_id, gaps, soft, line = self._index[begin : begin + self.VALUES]
        length = 4 * (tokens + self.ROW * triplets)
        values = np.frombuffer(os.pread(self._file.fileno(), length, 4 * offset), dtype=np.int32)
        table = values[tokens:].reshape(-1, self.ROW)
        return Example(
            ids=values[:tokens].tolist(),
            triplets=[Triplet(*row) for row in table[:, :3].tolist()],
            start=start,
            first_pair_id=first_pair_id,
            quality_gaps=table[:gaps, 3].copy().view(np.float32).tolist(),
            gold_better=table[:soft, 4].copy().view(np.float32).tolist(),
            line=line,
        )


@dataclass
class Summary:
    """Counts of a whole file, before max_length is applied."""

    lines: int = 0
    triplets: int = 0  # or labelled steps
    right: int | None = None  # of the steps; None for triplets
    duplicates: int = 0  # triplets that repeat one of the same line
    dropped: int = 0  # triplets at or beyond max_length
    emptied: int = 0  # lines left without a triplet
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
        if self.right is not None:
            return f"{self.lines:,} solutions, {self.triplets:,} labelled steps ({self.right:,} right)"
        return f"{self.lines:,} solutions, {self.triplets:,} triplets ({self.duplicates:,} duplicates)"

    def table(self) -> str:
        """Lengths, pairs, duplicates and what is left out, as text."""
        noun = "pairs" if self.right is None else "steps"
        lines = [f"{'':>20}{'min':>9}{'median':>9}{'mean':>9}{'max':>9}"]
        for name, counter in (("tokens a solution", self.lengths), (f"{noun} a solution", self.pairs)):
            values = list(counter.elements())
            spread = (min(values), median_low(values), fmean(values), max(values))
            lines.append(f"{name:>20}" + "".join(f"{value:>9,.4g}" for value in spread))
        lines.append(f"{f'duplicate {noun}':>20}{self.duplicates:>9,}")
        lines.append(f"{f'{noun} dropped':>20}{self.dropped:>9,}")
        lines.append(f"{'solutions left out':>20}{self.emptied:>9,}")
        return "\n".join(lines)


def read_records(path: str | Path) -> Iterator[Record]:
    """Every line that is not blank, in order: triplets, an exploration's verdicts (`pairs`) or labelled steps.

    Other keys but `quality` are ignored. Raises UserError at the first line that does not have the format.
    """
    for line, record in read_jsonl(path, "triplets"):
        yield _parse(record, line, f"{path}, line {line}")


def _rows(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Record]:
    """The rows of a dataset, as `read_records` reads lines."""
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise UserError(f"{name}, row {number}: expected an object, found a {type(row).__name__}")
        yield _parse(dict(row), number, f"{name}, row {number}")


def load_examples(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    *,
    limit: int | None = None,
    max_length: int | None = None,
    quality: bool = False,
    into: ExampleFile | None = None,
    rows: Iterable[Mapping[str, Any]] | None = None,
) -> tuple[ExampleFile, Summary]:
    """Read and tokenize a file, and check every position of every line.

    Args:
        template: Jinja text of the chat template; the tokenizer's own when None.
        limit: number of leading lines to read.
        max_length: tokens to keep of a line; triplets beyond are dropped, and lines without any left.
        quality: require the quality of each triplet's tokens.
        into: examples of other files, to append to.
        rows: rows of a dataset, instead of a file's lines; `path` then names it in errors.

    Raises UserError with the first misfits: line, position, expected and found token, and the likely cause.
    """
    examples, summary, misfits = ExampleFile() if into is None else into, Summary(), []
    records, unit = (read_records(path), "line") if rows is None else (_rows(rows, str(path)), "row")
    for record, ids, start in _tokenize(islice(records, limit), tokenizer, template):
        of_steps, where = record.steps is not None, f"{path}, {unit} {record.line}"
        if examples.of_steps not in (None, of_steps):
            raise UserError(f"{where}: found {FORMATS[of_steps]}, expected {FORMATS[not of_steps]} as before")
        examples.of_steps = of_steps
        if of_steps:
            ends = step_ends(tokenizer, record.messages[:-1], record.steps, template, where)
            record = replace(record, triplets=[Triplet(end, ids[end], ABSENT) for end in ends])
            summary.right = (summary.right or 0) + sum(map(int, record.gold_better))
        elif (misfit := find_misfit(ids, record.triplets, len(tokenizer), start)) is not None:
            misfits.append((record, ids, misfit, start))
            if len(misfits) == MAX_MISFITS:
                break
            continue
        if quality and record.quality_gaps is None:
            raise UserError(
                f"{where}: key 'quality': expected [gold's, negative's] for each of the samples, "
                "since quality_weight is on, found none"
            )
        kept = [i for i, t in enumerate(record.triplets) if max_length is None or t.position < max_length]
        summary.add(ids, record.triplets, len(kept))
        if kept:
            gaps = [record.quality_gaps[i] for i in kept] if record.quality_gaps is not None else []
            gold_better = [record.gold_better[i] for i in kept] if record.gold_better is not None else []
            triplets = [record.triplets[i] for i in kept]
            examples.append(ids[:max_length], triplets, start, gaps, gold_better, record.line)
    if misfits:
        raise UserError(_explain(path, unit, tokenizer, misfits))
    if not summary.triplets:
        raise UserError(f"{path}: expected at least one triplet, found none in {summary.lines} {unit}s")
    if summary.emptied == summary.lines:
        raise UserError(f"{path}: expected triplets before max_length {max_length}, found none")
    return examples, summary


def find_misfit(ids: Sequence[int], triplets: Iterable[Triplet], vocabulary: int, start: int = 1) -> Triplet | None:
    """The first triplet that does not fit the token ids of a conversation whose solution begins at `start`."""
    for triplet in triplets:
        position, gold, negative = triplet
        if (
            not max(1, start) <= position < len(ids)
            or ids[position] != gold
            or not 0 <= negative < vocabulary
            or negative == gold
        ):
            return triplet
    return None


def record_line(messages: Sequence[Message], triplets: Iterable[Triplet], **extra: Any) -> str:
    """One line of the format, newline included, with further keys from `extra`."""
    record = {"messages": list(messages), "samples": [list(triplet) for triplet in triplets], **extra}
    return json.dumps(record, ensure_ascii=False) + "\n"


def _parse(record: dict, line: int, where: str, gold_better: list[float] | None = None) -> Record:
    if record.get("pairs") is not None:  # a dataset has every key in every row
        return _from_verdicts(record, line, where)
    if record.get("completions") is not None:
        return _from_steps(record, line, where)
    for key in ("messages", "samples"):
        if not isinstance(record.get(key), list):
            raise UserError(f"{where}: expected the key {key!r} with a list")
    check_messages(record["messages"], where)
    for sample in record["samples"]:
        if not isinstance(sample, list) or len(sample) != 3 or any(type(value) is not int for value in sample):
            raise UserError(
                f"{where}: key 'samples': expected [position, gold_token_id, negative_token_id], found {quote(sample)}"
            )
    if not record["messages"]:
        raise UserError(f"{where}: key 'messages': expected at least one message, found none")
    triplets = [Triplet(*sample) for sample in record["samples"]]
    gaps = _quality_gaps(record.get("quality"), len(triplets))
    return Record(record["messages"], triplets, line, gaps, gold_better)


def _from_steps(record: dict, line: int, where: str) -> Record:
    if record.get("samples") is not None:
        raise UserError(f"{where}: expected messages and samples, found completions of labelled steps too")
    prompt, steps = read_steps(record, where)
    answer = {"role": "assistant", "content": as_text(steps)}
    labels = [float(label) for label in read_labels(record, where)]
    return Record([*prompt, answer], [], line, gold_better=labels, steps=steps)


def _from_verdicts(record: dict, line: int, where: str) -> Record:
    """Convert a line of OUTPUT.pairs.jsonl to triplets of all tokens with rollouts, including ties and undecided ones.

    The target of a pair is the probability, given the rollouts of both tokens, that gold's quality is higher.
    """
    try:
        verdicts = [(pair["triplet"], _counts(pair["gold"]), _counts(pair["token"])) for pair in record["pairs"]]
        pairs = [(triplet, gold, token) for triplet, gold, token in verdicts if token[1]]
        quality = [[right / n, other / m] for _, (right, n), (other, m) in pairs]
        gold_better = [probability_worse(token, gold) for _, gold, token in pairs]
    except (TypeError, LookupError, ValueError, ArithmeticError):
        raise UserError(
            f"{where}: key 'pairs': expected objects with 'triplet', and 'gold' and 'token' as [right, rollouts]"
        ) from None
    triplets = [triplet for triplet, *_ in pairs]
    record = {"messages": record.get("messages"), "samples": triplets, "quality": quality}
    return _parse(record, line, where, gold_better)


def _counts(value: Any) -> tuple[int, int]:
    right, rollouts = value
    if type(right) is not int or type(rollouts) is not int or not 0 <= right <= rollouts:
        raise ValueError(value)
    return right, rollouts


def _quality_gaps(quality: Any, num_triplets: int) -> list[float] | None:
    """Differences of the [gold's, negative's] qualities that exploration writes for every triplet."""
    if not isinstance(quality, list) or len(quality) != num_triplets:
        return None
    for pair in quality:
        if not isinstance(pair, list) or len(pair) != 2 or any(type(share) not in (int, float) for share in pair):
            return None
        if not all(0 <= share <= 1 for share in pair):
            return None
    return [gold - negative for gold, negative in quality]


def _tokenize(
    records: Iterator[Record], tokenizer: PreTrainedTokenizerBase, template: str | None
) -> Iterator[tuple[Record, list[int], int]]:
    """Yield each record with its token ids and the position where its solution (last message) begins."""
    while chunk := list(islice(records, TOKENIZED_LINES)):
        conversations = encode_chats(tokenizer, [record.messages for record in chunk], template)
        questions = [record.messages[:-1] for record in chunk]
        prompts = iter(encode_chats(tokenizer, [messages for messages in questions if messages], template, True))
        for record, ids, question in zip(chunk, conversations, questions, strict=True):
            # may be shorter than the prompt: some templates write more in a generation prompt than before a solution
            yield record, ids, common_prefix(ids, next(prompts)) if question else 0


def _explain(
    path: str | Path,
    unit: str,
    tokenizer: PreTrainedTokenizerBase,
    misfits: list[tuple[Record, list[int], Triplet, int]],
) -> str:
    """A sentence for each misfit, and their common cause if there is one."""
    lines = [f"{path}: triplets do not fit the tokenizer {tokenizer.name_or_path} and its chat template:"]
    for record, ids, (position, gold, negative), start in misfits:
        where = f"  {unit} {record.line}, position {position}:"
        if not 0 <= negative < len(tokenizer):
            lines.append(f"{where} negative token {negative} is not in the vocabulary of {len(tokenizer)} tokens")
        elif negative == gold:
            lines.append(f"{where} gold and negative are the same token {_quote(tokenizer, gold)}")
        elif not 0 < position < len(ids):
            lines.append(f"{where} expected token {_quote(tokenizer, gold)}, but the {unit} has only {len(ids)} tokens")
        elif ids[position] == gold:
            lines.append(f"{where} the token is in the question, expected one of the solution, from position {start}")
        else:
            expected, found = _quote(tokenizer, gold), _quote(tokenizer, ids[position])
            lines.append(f"{where} expected token {expected}, found {found}")
    shifts = {_shift(ids, record.triplets) for record, ids, *_ in misfits}
    if len(shifts) == 1 and (shift := shifts.pop()):
        lines.append(
            f"  likely cause: the chat template writes {abs(shift)} tokens {'more' if shift > 0 else 'fewer'} before "
            "the solution than the one the triplets were made with (a system preamble or a date?); "
            "try the chat template llama3-plain or chatml-plain"
        )
    return "\n".join(lines)


def _shift(ids: list[int], triplets: list[Triplet]) -> int | None:
    """The smallest shift of positions, in tokens, that explains all gold tokens of a line."""
    first = triplets[0]
    shifts = [index - first.position for index, token in enumerate(ids) if token == first.gold]
    for shift in sorted(shifts, key=abs):
        if all(0 <= t.position + shift < len(ids) and ids[t.position + shift] == t.gold for t in triplets):
            return shift
    return None


def _quote(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    in_vocabulary = 0 <= token < len(tokenizer)
    return f"{token} {tokenizer.decode([token])!r}" if in_vocabulary else f"{token} (outside the vocabulary)"
