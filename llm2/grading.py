"""Which number a solution gives as its answer, and whether that is the gold number.

Knows how models write a final answer (GSM8K's `####`, `the answer is`, LaTeX boxes, a last sentence) and how they write
numbers. Leaves to others where solutions come from, what is counted with the grades, and the voting.

Reading is bounded: a marker and the last digit are found by plain string search, and only a window of a few hundred
characters around them is parsed, so that no text, however long or odd, takes more than a moment.
"""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from operator import itemgetter
from typing import Literal, NamedTuple

Mode = Literal["flexible", "strict"]

WINDOW = 300  # characters that are parsed at a time
LONGEST_NUMBER = 200  # characters; a longer one is a model in a loop, not an answer
LONGEST_SOLUTION = 20_000  # characters in which the next speaker is looked for
MARKERS_TRIED = 16  # from the end of the text
WINDOWS_TRIED = 4  # likewise


def extract_answer(text: str, mode: Mode = "flexible") -> str | None:
    """The solution's answer in canonical form (`72`, `-0.5`, `1/3`), or None where there is none that can be read.

    strict: the number at the last `#### N` or `the answer is N`. flexible: the one at the last of these, of LaTeX boxes
    and of a closing `Answer:`; where there is none of them, the last number of the text. Two answers are equal as
    numbers exactly if their canonical forms are the same string.
    """
    text = _own_turn(text)
    announcements = (_strict,) if mode == "strict" else (_strict, _boxed, _announced)
    found = [one for announcement in announcements if (one := announcement(text))]
    number = max(found, key=itemgetter(0))[1] if found else None
    if number is None and mode == "flexible":
        number = _last_number(text)
    return None if number is None or number.value is None else canonical(number.value)


def is_correct(text: str, gold: str, mode: Mode = "flexible") -> bool:
    """Whether the solution's answer is the gold one: a number (`1,000`) or a gold solution that ends in `#### 72`."""
    answer = extract_answer(text, mode)
    return answer is not None and answer == extract_answer(gold)


class Grade(NamedTuple):
    """One solution's grade."""

    answer: str | None  # equal answers are equal strings: they vote together; None where none can be read
    correct: bool
    correct_strict: bool  # by the format's own final-answer marker alone


def grade_numbers(texts: Sequence[str], gold: str) -> list[Grade]:
    """The grades of a problem's solutions, where the answer is a number."""
    return [Grade(extract_answer(text), is_correct(text, gold), is_correct(text, gold, "strict")) for text in texts]


def canonical(value: Fraction) -> str:
    """One string per number: an integer, a decimal where it is finite, a fraction in lowest terms otherwise."""
    if value.denominator == 1:
        return str(value.numerator)
    places = next((n for n in range(1, 2 * LONGEST_NUMBER) if 10**n % value.denominator == 0), None)
    if places is None:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return "-" * (value < 0) + f"{digits[:-places]}.{digits[-places:]}"


# --- Whose text it is: the solution ends where the next speaker or the next question begins ---

_TURN = re.compile(
    r"<\|(?:eot_id|end_of_text|im_end|endoftext|end)\|>|</s>"
    r"|\n[ \t]{0,8}(?:#{1,6} |\*\*)?(?:Q|Question|Problem|Human|User|Instruction):"
)
_DIGIT = re.compile("[0-9\uff10-\uff19½⅓⅔¼¾⅛]")


def _own_turn(text: str) -> str:
    """The text behind a closed thought and before the next turn."""
    _, closed, answer = text.rpartition("</think>")
    if closed and _DIGIT.search(answer):
        text = answer
    first_digit = _DIGIT.search(text)
    turn = first_digit and _TURN.search(text, first_digit.end(), first_digit.end() + LONGEST_SOLUTION)
    if turn and not _TURN.match("\n" + text.lstrip()[:40]):  # a question restated at the start is not the next one
        return text[: turn.start()]
    return text


# --- Numbers in a window of text ---


class Number(NamedTuple):
    """A number as it stands in a (plain) window; value is None where it is too long or divides by zero."""

    start: int
    end: int
    value: Fraction | None
    ordinal: bool  # `5th`: an answer only where there is no cardinal


_CHARACTERS = str.maketrans(
    {
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},  # full-width digits
        **{"½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅛": " 1/8"},
        **dict.fromkeys("\u2212\u2013\u2010\u2011\ufe63\uff0d", "-"),  # minus signs, hyphens, the dash of ranges
        **dict.fromkeys("\u00d7\u00b7\u2219\u22c5\u2217", "*"),
        **dict.fromkeys("\u2248\u2245\u2243\uff1d", "="),
        **{"\u00f7": "/", "\u2044": "/", "\uff0c": ",", "\uff0e": ".", "\u200b": None, "\ufeff": None},
    }
)
_FRACTION = r"\\[dtc]?frac\s?\{\s?([0-9,.]{1,30})\s?\}\s?\{\s?([0-9,.]{1,30})\s?\}"
_REWRITES = [  # in this order; the first: thousands may be set off by thin spaces, and no number but `1 000` writes 000
    (re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[,!;:]|\\ |[\u00a0\u2009\u202f]| (?=000))(?=[0-9]{3}(?![0-9]))"), ","),
    (re.compile(r"\\[dtc]?frac\s?([0-9])([0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(rf"-\s?{_FRACTION}"), r"-\1/\2 "),  # a space would set the minus apart, as an operator is
    (re.compile(_FRACTION), r" \1/\2 "),
    (re.compile(r"\\([$%#&])"), r"\1"),
    (re.compile(r"\\(?:times|cdot)(?![a-zA-Z])"), "*"),
    (re.compile(r"\\(?:approx|simeq)(?![a-zA-Z])"), "="),
    (re.compile(r"\\(?:div|slash)(?![a-zA-Z])"), "/"),
    (re.compile(r"\\[a-zA-Z]+|\\[^a-zA-Z]"), " "),
    (re.compile(r"\^\s?\{\s?(-?[0-9]{1,3})\s?\}"), r"^\1"),
    (re.compile(r"(?<=[0-9])\*\*(?=[0-9])"), "^"),
    (re.compile(r"\*\*|__|[`{}]"), " "),
    (re.compile(r"\b(?:Rs|INR|USD|US|EUR|GBP|AUD|CAD|RM|Php)\.? ?(?=[$0-9])", re.IGNORECASE), "$"),
    (re.compile(r"\bequals\b|\bis equal to\b", re.IGNORECASE), "="),
    (re.compile(r"(?:^|(?<=is )|(?<=[=#])|(?<=[=#] ))minus (?=[$0-9])", re.IGNORECASE), "-"),
]

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})*,[0-9]{3,}|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}|[0-9]+)"
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_SCALE = "|".join(_SCALES)
_VALUE = rf"(?:{_DIGITS}(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)"
_NUMBER = re.compile(
    rf"""(?<![0-9A-Za-z^])(?<![A-Za-z]_)(?<!\^-)(?:
      (?P<hour>[01]?[0-9]|2[0-4]):(?P<minutes>[0-5][0-9])(?::[0-5][0-9])?(?![0-9:])
    | (?P<whole>[0-9]{{1,9}})(?:[ ]{{1,3}}|[ ]?&[ ]?|[ ]and[ ])
      (?P<part>[0-9]{{1,4}})[ ]?/[ ]?(?P<parts>[0-9]{{1,4}})(?![0-9/])
    | (?<![0-9]/)(?P<over>{_VALUE})[ ]?/[ ]?\$?(?P<under>{_VALUE})(?![ ]?/[ ]?[0-9]|[0-9^])
    | (?P<base>[0-9]{{1,4}})\^(?P<power>-?[0-9]{{1,2}})(?![0-9])
    | (?P<mantissa>{_VALUE})\s?[*xX]\s?10\^(?P<exponent>-?[0-9]{{1,2}})(?![0-9])
    | (?P<plain>{_VALUE})(?:[eE](?P<e>[+-]?[0-9]{{1,2}})(?![0-9A-Za-z])|[ -]?(?P<scale>{_SCALE})\b)?
    )(?P<ordinal>(?:st|nd|rd|th)\b)?""",
    re.VERBOSE,
)


def _plain(window: str) -> str:
    """The window without its typography: one minus, one multiplication sign, no LaTeX and no markdown."""
    window = window.translate(_CHARACTERS)
    for pattern, replacement in _REWRITES:
        window = pattern.sub(replacement, window)
    return window


def _numbers(plain: str) -> Iterator[Number]:
    for match in _NUMBER.finditer(plain):
        if match["hour"] and match["minutes"] != "00":
            continue  # a time of day is no quantity, but 7:00 answers "at what hour" with 7
        value = _value(match)
        if value is not None and _is_negative(plain[max(0, match.start() - 24) : match.start()]):
            value = -value
        yield Number(match.start(), match.end(), value, bool(match["ordinal"]))


def _value(match: re.Match) -> Fraction | None:
    if match.end() - match.start() > LONGEST_NUMBER:
        return None
    numerals = {name: text for name, text in match.groupdict().items() if text and name not in ("ordinal", "scale")}
    part = {name: Fraction(text.replace(",", "")) for name, text in numerals.items()}
    if "hour" in part:
        return part["hour"]
    if "whole" in part:
        whole = part["whole"] if part["part"] < part["parts"] else 0  # `5 10/2` is two numbers, not a mixed one
        return whole + part["part"] / part["parts"] if part["parts"] else None
    if "over" in part:
        return part["over"] / part["under"] if part["under"] else None
    if "base" in part:
        return part["base"] ** int(part["power"]) if part["base"] or part["power"] > 0 else None
    significand, exponent = ("mantissa", "exponent") if "mantissa" in part else ("plain", "e")
    value = part[significand]  # most often alone, and every product of fractions costs as much as finding it
    if exponent in part:
        value *= Fraction(10) ** int(part[exponent])
    return value * _SCALES[match["scale"]] if match["scale"] else value


_MINUS = re.compile(r"(?P<word>(?<![A-Za-z])negative\s{1,2})?(?P<sign>-)?(?P<gap>[\s$€£¥₹]*)$", re.IGNORECASE)


def _is_negative(before: str) -> bool:
    """Whether what stands before a number makes it negative: not the minus of `10 - 3` or `5-3`, nor a bullet `- 3`."""
    sign = _MINUS.search(before)
    if sign["word"] or not sign["sign"]:
        return bool(sign["word"])
    left = before[: sign.start("sign")]
    if re.search(r"[0-9)\]%][ $€£¥₹]*$|[A-Za-z-]$", left):
        return False
    return not re.search(r"\s", sign["gap"]) or left.rstrip(" $€£¥₹").endswith(("=", "#"))


# --- Where the answer stands ---

_ANSWER_IS = re.compile(
    r"answers?(?:,? (?:to|for|in|of) [^.!?:\n]{1,80}?)?[\s*_\"',]{1,4}(?:therefore|thus|then)?,? ?"
    r"(?:is|are|=|(?:will|would|should|must) be|comes to)(?![A-Za-z])(?! not )",
    re.IGNORECASE,
)
_ANSWER_COLON = re.compile(r"answers?[\s*_]{0,4}[:=]", re.IGNORECASE)
_FILLERS = "the|final|correct|answer|is|about|approx|approximately|around|exactly|just|simply|only|equal|to|a|total|of"
_DIRECT = re.compile(rf"(?:[\W_]|\b(?:{_FILLERS}|therefore|thus|[a-z](?=\s?=))\b)*$", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
_TAIL_END = re.compile(r"[.!?;](?=\s|$)|\n|,(?=\s)|(?<![-+*/=x(])\s\(|\s(?:because|since|as|so|or)\s")
_RESULT = re.compile(r"=[\s$€£¥₹~(<-]{0,8}$")  # what stands before the result of an equation
_OPERATION = re.compile(r"\s?[-+*/]\s?[$(]?[0-9]")  # what follows a number that is yet to be worked out
_CUT_OFF = re.compile(r"[\s$)%]{0,8}(?:[=+/\u00d7\u00f7]|\s\*)\s{0,8}\$?\Z")
_LIST_ITEM = re.compile(r"[.)]\s+\*{0,2}[A-Za-z]")


def _strict(text: str) -> tuple[int, Number] | None:
    """Where the last `####` or `answer is` that has a number stands, and that number."""
    for start in sorted([*_positions(text, "####"), *_answer_positions(text)], reverse=True):
        if text[start] == "#":
            number = _number_after(text[start : start + WINDOW], must_follow=True)
        else:
            marker = _ANSWER_IS.match(text, start)
            number = marker and _number_after(text[marker.end() : marker.end() + WINDOW], must_follow=False)
        if number:
            return start, number
    return None


def _boxed(text: str) -> tuple[int, Number] | None:
    """Where the last box that has a number stands, and that number."""
    for start in _positions(text, "\\boxed"):
        number = _stated(_plain(_group(text[start : start + WINDOW])))
        if number:
            return start, number
    return None


def _announced(text: str) -> tuple[int, Number] | None:
    """Where the last `Final answer:` stands, or an `Answer:` that does not head a solution, and its number."""
    last_digit = _last_digit(text, len(text))
    for start in _answer_positions(text):
        marker = _ANSWER_COLON.match(text, start)
        if not marker:
            continue
        announced = text[marker.end() : marker.end() + WINDOW]
        sentence_end = _SENTENCE_END.search(announced, len(announced) - len(announced.lstrip(" *_\n")))
        closing = sentence_end is None or last_digit < marker.end() + sentence_end.start()
        if closing or text[max(0, start - 6) : start].lower() == "final ":
            number = _number_after(announced, must_follow=True)
            return (start, number) if number else None
    return None


def _last_number(text: str) -> Number | None:
    """The text's last cardinal; an ordinal (`on the 5th day`) only where there is no cardinal near the end.

    A text that was cut off within a calculation (`9 * 2 =`, or an annotation `<<9*2=1` that never closes) has none: the
    last number it holds is an operand, not a result.
    """
    end, ordinal = _last_digit(text, len(text)), None
    annotation = text.rfind("<<", max(0, end - WINDOW))
    if _CUT_OFF.match(text, end + 1) or annotation >= 0 and text.find(">>", annotation) < 0:
        return None
    for _ in range(WINDOWS_TRIED):
        start = max(0, end - WINDOW)
        numbers = list(_numbers(_plain(text[start : end + 20])))
        cardinals = [number for number in numbers if not number.ordinal]
        if cardinals:
            return cardinals[-1]
        ordinal = ordinal or (numbers[-1] if numbers else None)
        end = _last_digit(text, start)
    return ordinal


def _number_after(window: str, must_follow: bool) -> Number | None:
    """The number stated behind a marker: in the same sentence, or behind nothing but symbols and filler words."""
    plain = _plain(window)
    number = next(_numbers(plain), None)
    lead = plain[: number.start] if number else ""
    if number is None or not _DIRECT.match(lead) and (must_follow or _SENTENCE_END.search(lead)):
        return None
    if ("#" in lead or "\n" in lead) and _LIST_ITEM.match(plain, number.end):
        return None  # a heading `#### 1. First step`, or a numbered list
    return _stated(plain)


def _stated(plain: str) -> Number | None:
    """The first number of a statement, or what it works out to: `48 + 24 = 72 clips (24 of them in May)` is 72."""
    numbers = list(_numbers(plain))
    if not numbers:
        return None
    tail = _TAIL_END.search(plain, numbers[0].end)
    end = tail.start() if tail else len(plain)
    results = [number for number in numbers if number.start < end and _RESULT.search(plain[: number.start])]
    return results[-1] if results and not _OPERATION.match(plain, results[-1].end) else numbers[0]


def _group(after: str) -> str:
    """What a box holds: up to the brace that closes its first one."""
    depth = 0
    for position, character in enumerate(after):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "}" and depth <= 0:
            return after[:position]
    return after


def _positions(text: str, marker: str) -> Iterator[int]:
    """Where the marker stands, from the end of the text, at most so many times."""
    position = len(text)
    for _ in range(MARKERS_TRIED):
        position = text.rfind(marker, 0, position)
        if position < 0:
            return
        yield position


def _answer_positions(text: str) -> list[int]:
    positions = sorted({*_positions(text, "nswer"), *_positions(text, "NSWER")}, reverse=True)
    return [position - 1 for position in positions if position and text[position - 1] in "aA"]


def _last_digit(text: str, end: int) -> int:
    """The position of the last digit before `end`; -1 where there is none."""
    match = _DIGIT.search(text[:end][::-1])
    return end - 1 - match.start() if match else -1
