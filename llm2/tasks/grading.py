r"""Answers of GSM8K-like solutions: extraction and comparison as numbers.

The two modes are lm-evaluation-harness's strict-match and flexible-extract, with four intended differences: numbers
are compared as numbers (there `18.00` is not `18`), flexible prefers an announced answer to a later number, where an
answer is announced more than once, the last one counts (there strict takes the first), and a solution ends at any other
prompt behind its first number (there at any `Question:`, the solution's own too, and at no `Problem:`).
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

MatchMode = Literal["flexible", "strict"]

LONGEST_SOLUTION = 10_000  # trailing characters that are read, to bound the time
LONGEST_STATEMENT = 200
LONGEST_NUMBER = 50  # digits; a longer number is a repetition loop, not an answer

END_OF_TURN = re.compile(r"</s>|<\|im_end\|>")
NEXT_PROMPT = re.compile(  # where a base model continues with another question
    r"""\n[ \t>\#*]{0,9}+(?:(?:q|question|problem)(?:\ ?\#?\d{1,3})?|instruction|user|human)\*{0,2}(?:[:\n]|$)
    |<\|(?:im_start|start_header_id)\|>""",
    re.IGNORECASE | re.VERBOSE,
)
NO_DIGITS = re.compile(r"\D*")
MINUS = re.compile("[\u2010-\u2013\u2212\ufe63\uff0d]")  # hyphens, the en dash, the typographic minus
THIN_SPACE = re.compile(r",?\\[,!]|\{,\}|[\u00a0\u2009\u202f](?=\d{3}(?!\d))")  # between thousands
FRAC = re.compile(r"\\[dt]?frac\{(\d{1,9})\}\{(\d{1,9})\}")
NUMBER = re.compile(
    r"""(?:(?<![\w)])([-+]))?  # a sign, but not the minus of `5-3`
    \\?[$£€¥₹]?
    ((?:\d+(?:,\d\d+)*(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE][-+]?\d{1,3}(?!\w)|\ ?/\ ?\d+)?)""",
    re.VERBOSE,
)
ANNOUNCEMENTS = {
    "strict": re.compile(r"####|\banswer is\b", re.IGNORECASE),
    "flexible": re.compile(
        r"""\#\#\#\#|\banswer\ is\b|\bfinal\ answer\b(?:\ is\b)?|\\(?:boxed|fbox)\{
        |(?P<heading>\banswer[\s*_]{0,5}:|<answer>)""",
        re.IGNORECASE | re.VERBOSE,
    ),
}
DECORATION = re.compile(  # between an announcement and its number, but not the number of a list item
    r"""(?:[\s:=*_`$£€¥₹]|\\[(\[]|\\(?:boxed|fbox|math\w{2}|text\w{0,6})\{){0,20}
    (?=\\?[-+$.\d])(?!(?<=[\n*])1[.)]\s)""",
    re.VERBOSE,
)
STATEMENT_END = re.compile(r"[.!?,;](?=\s|$)|[\n}]|\s(?:because|since)\s")


class Grade(NamedTuple):
    """One solution's grade."""

    answer: str | None  # equal answers are equal strings, for voting; None if there is none
    correct: bool
    correct_strict: bool


def extract_answer(text: str, mode: MatchMode = "flexible") -> str | None:
    r"""The solution's final answer in canonical form (see `canonical`), or None.

    strict: the number right after the last `####` or `answer is`, in upper or lower case. flexible: the number right
    after the last of these, of `final answer`, `answer:` and `\boxed{`; the last number if there is none of them.
    """
    text = own_solution(text.rpartition("</think>")[2])  # skip a reasoning model's thoughts
    text = FRAC.sub(r"\1/\2", THIN_SPACE.sub(",", MINUS.sub("-", text[-LONGEST_SOLUTION:])))
    for announcement in reversed(list(ANNOUNCEMENTS[mode].finditer(text))):
        if decoration := DECORATION.match(text, announcement.end()):
            statement = text[decoration.end() : decoration.end() + LONGEST_STATEMENT]
            statement = STATEMENT_END.split(statement, maxsplit=1)[0]
            before, behind = text.find("=") < announcement.start(), text.rfind("=") < decoration.end() + len(statement)
            if announcement.lastgroup == "heading" and not (before or behind):
                continue  # a heading: the calculations follow
            if number := _find_number(statement):
                return _read(number)
    numbers = list(NUMBER.finditer(text)) if mode == "flexible" else []
    return _read(numbers[-1]) if numbers else None


def own_solution(text: str) -> str:
    """The text up to another prompt. A prompt before any number repeats or splits the question, and is kept."""
    text = END_OF_TURN.split(text, maxsplit=1)[0]
    begin = NO_DIGITS.match(text)[0]
    return begin + NEXT_PROMPT.split(text[len(begin) :], maxsplit=1)[0]


def is_correct(text: str, gold: str, mode: MatchMode = "flexible") -> bool:
    """Whether the solution's answer is the gold one: a number (`1,000`) or a gold solution that ends in `#### 72`."""
    answer = extract_answer(text, mode)
    return answer is not None and answer == extract_answer(gold)


def grade_numbers(texts: Sequence[str], gold: str) -> list[Grade]:
    """The grades of a problem's solutions, where the answer is a number."""
    return [Grade(extract_answer(text), is_correct(text, gold), is_correct(text, gold, "strict")) for text in texts]


def canonical(value: Fraction) -> str:
    """One string per number: an integer, a decimal where it is finite, a fraction in lowest terms otherwise."""
    num_decimals = next((n for n in range(LONGEST_NUMBER) if 10**n % value.denominator == 0), None)
    if not num_decimals:
        return str(value)
    whole, decimals = divmod(abs(value.numerator) * 10**num_decimals // value.denominator, 10**num_decimals)
    return f"{'-' * (value < 0)}{whole}.{decimals:0{num_decimals}}"


def _find_number(statement: str) -> re.Match | None:
    """The first number of a statement, or the result of its equation: 16 of `32 / 2 = 16`."""
    return NUMBER.search(statement.rpartition("=")[2]) or NUMBER.search(statement)


def _read(number: re.Match) -> str | None:
    sign, digits = number.groups(default="")
    if len(digits) > LONGEST_NUMBER:
        return None
    try:
        return canonical(Fraction(sign + digits.replace(",", "").replace(" ", "")))
    except (ValueError, ZeroDivisionError):  # `1.5/2`, `1/0`
        return None
