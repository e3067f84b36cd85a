"""Arithmetic as code: next tokens that would make an equation false are forbidden.

A learned System 2 weighs tokens; what can be computed needs no weighing. Behind `12 + 30 =` at the end of a text only
tokens are left that can go on to 42. Nothing is forbidden where it is not sure what the text computes: units between
numbers, unknowns, percentages, another number or an operation in (English) words before the left side, such as `5 times
2 + 3` or `half of 10 + 2`, a left side that goes back beyond its line or `TAIL` tokens.
"""

import ast
import operator
import re
from fractions import Fraction
from functools import cached_property, lru_cache

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

TAIL = 48  # tokens before the next one that are read
EXACT = 4  # decimals up to which a result may not be rounded
SPACES = 2  # in front of a result
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
CUT = "…"  # in the place of text that is not read
SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "$": " ", "\t": " ", "\xa0": " "})
TIMES = re.compile(r"(?<=[\d)])( *)x(?= *[\d(])")
# The left side, `=`, and what is written of the result; the left side ends with a number or a bracket.
EQUATION = re.compile(r"(?P<left>[\d.,+\-*/() ]*[\d)]) *=(?P<right>[^=\n]*)\Z")
# What stands before it: words alone, from the beginning of a text, line, quotation, sentence, or of `Step 1: `, or from
# another number on.
BEGINNING = r"\A|[\n=<{\[`'\"(]|[^\W_][.,;]|[^\W\d_][:!?]|[^\W\d_] \d+:|(?P<number>\d)"
WORDS = re.compile(rf"(?:{BEGINNING}) *(?P<words>(?:(?:[^\W\d_](?:['’-]?[^\W\d_])+|[AaI]) +)*)\Z")
# Words that may take part in what is computed if the last one is; behind these, `of` does not.
IN_WORDS = "plus|minus|times|by|over|mod|modulo|per|than|as|from|to|into|add|subtract|multiply|divide|added|subtracted"
IN_WORDS += "|multiplied|divided|half|twice|double|thrice|triple|quarter|third|dozen|hundred|thousand|million|billion"
IN_WORDS += "|square|squared|cube|cubed|root|sqrt|log|ln|lg|exp|sin|cos|tan|abs|max|min|floor|ceil|round|gcd|lcm"
OPERATION = re.compile(IN_WORDS + "|percent|negative|average|mean")
SUMS = ("total", "sum", "cost", "price", "amount")
NUMBER = re.compile(r"\s*[$€£]?\s*(?P<sign>[-−]?)(?P<digits>(?:\d[\d,]*)?)(?P<point>\.?)(?P<decimals>\d*)")
FRACTION = re.compile(r"\s*[-−]?\d+ ?\d*/?\d*")  # or a mixed number, or the beginning of one
REPEATED = re.compile(r"([^\d])\1{3,}")
HEAD = re.compile(r"[\s\d.,$€£−%/-]*")  # of a token: what a number may hold


class Arithmetic(LogitsProcessor):
    """Sets the logits of tokens to -inf that would write a false result behind the left side of an equation.

    A result with at most `EXACT` decimals must be written in full, any other may be rounded in its last place, up or
    down: 7 / 2 is 3.5, 10 / 3 may be 3.33, 3.34 or 3. One that is not whole may also be a fraction in lowest terms
    (7/2, 3 1/2), and one below 1 a percentage. What stands behind `=` must be the result itself or no number, whatever
    follows it; of a chain such as `2 * 3 + 4 = 6 + 4 = 10` only the last part can be written. A token is judged by its
    text, whether it has one digit, several, or text behind them.

    For `generate`, `LLM2.generate` and the key `logits_processor`. It reads the prompt like any text, from the last
    special token on. Where a prompt ends in a false result, nothing is forbidden.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """input_ids (B, T), logits (B, V) -> logits (B, V), -inf where forbidden."""
        processed = scores
        for row, tail in enumerate(input_ids[:, -TAIL:].tolist()):
            if self.equals.isdisjoint(tail):
                continue
            found = open_equation(self._text(tail, input_ids.shape[-1] > TAIL))
            if found is not None:
                # A model may have more logits than its tokenizer has tokens, or fewer.
                forbidden = self._forbidden(*found)[: scores.shape[-1]].to(scores.device)
                processed = scores.clone() if processed is scores else processed
                processed[row, : len(forbidden)].masked_fill_(forbidden, -torch.inf)
        return processed

    def _text(self, tail: list[int], is_cut: bool) -> str:
        """The text behind the last special token, of which there may be more if it is cut."""
        start = max((at for at, token in enumerate(tail, start=1) if token in self.special), default=0)
        text = self.tokenizer.decode(tail[start:], clean_up_tokenization_spaces=False)
        return CUT + text if is_cut and not start else text

    @cached_property
    def special(self) -> set[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        return {*self.tokenizer.all_special_ids, *(token for token, text in added if text.special)}

    @cached_property
    def texts(self) -> list[str]:
        """The text of each token behind another, where tokenizers keep a leading space."""
        (anchor,) = self.tokenizer.encode("=", add_special_tokens=False)[-1:]
        pairs = [[anchor, token] for token in range(len(self.tokenizer))]
        start = len(self.tokenizer.decode([anchor]))
        return [text[start:] for text in self.tokenizer.batch_decode(pairs, clean_up_tokenization_spaces=False)]

    @cached_property
    def equals(self) -> set[int]:
        """The ids of tokens that hold `=`."""
        return {token for token, text in enumerate(self.texts) if "=" in text}

    @cached_property
    def heads(self) -> tuple[list[str], torch.Tensor]:
        """What decides about tokens, without doubles, and the index of each token's: the beginning of its text that a
        number may hold, repetitions cut short, with an x for the rest."""
        heads = []
        for text in self.texts:
            head = HEAD.match(text)[0]
            heads.append(REPEATED.sub(r"\1\1\1", re.sub(r"[^\S\n]", " ", head)) + "x" * (head != text))
        distinct = {head: index for index, head in enumerate(dict.fromkeys(heads))}
        return list(distinct), torch.tensor([distinct[head] for head in heads])

    @lru_cache(maxsize=256)  # noqa: B019, a processor lives as long as its tokenizer
    def _forbidden(self, result: Fraction, right: str) -> torch.Tensor:
        """Which tokens may not follow, (V,)."""
        heads, index = self.heads
        forbidden = torch.tensor([not can_become(right + head, result) for head in heads])[index]
        return torch.zeros_like(forbidden) if forbidden.all() else forbidden


def open_equation(text: str) -> tuple[Fraction, str] | None:
    """The result of the equation that the text ends in, and what is written of it; None without anything to judge."""
    text = TIMES.sub(r"\1*", text.translate(SIGNS))
    found = EQUATION.search(text)
    if found is None:
        return None
    *sentences, left = re.split(r"[.,] ", found["left"])
    result = value(left.strip()) if sentences or _begins(text[: found.start()] + left[: -len(left.lstrip())]) else None
    if result is None:
        return None
    forms = (NUMBER, FRACTION) if result.denominator > 1 else (NUMBER,)
    is_open = any(form.fullmatch(found["right"]) for form in forms)
    return (result, found["right"]) if is_open else None


def _begins(before: str) -> bool:
    """Whether a left side behind this text is the whole of what is computed."""
    found = WORDS.search(before)
    if found is None:
        return False
    *_, second, last = words = ["", "", *found["words"].lower().split()]
    if found["number"]:  # `6 shells and Nina has 5 + 3`, but not `3 boxes of 5 + 3`, `6 fois 5 + 3`
        return len(words) >= 5 and not any(word == "of" or OPERATION.fullmatch(word) for word in words)
    return second in SUMS if last == "of" else OPERATION.fullmatch(last) is None


@lru_cache(maxsize=4096)
def value(left: str) -> Fraction | None:
    """The value of a left side, None if it is no sum, product and so on of numbers that begins with one."""
    if left.startswith(("+", "-", "*", "/")):  # behind a word, or an item of a list
        return None
    try:
        tree = ast.parse(re.sub(r"(?<=\d),(?=\d{3})", "", left), mode="eval").body
        return value_of(tree) if isinstance(tree, ast.BinOp) else None
    except (SyntaxError, KeyError, ZeroDivisionError, RecursionError, ValueError):
        return None


def value_of(node: ast.expr) -> Fraction:
    """Raises ValueError, KeyError or ZeroDivisionError for what is no sum, product and so on of numbers."""
    if isinstance(node, ast.BinOp):
        return OPERATIONS[type(node.op)](value_of(node.left), value_of(node.right))
    if isinstance(node, ast.Constant):
        return Fraction(str(node.value))
    raise ValueError(node)


def can_become(right: str, result: Fraction) -> bool:
    """Whether what is written behind `=`, and perhaps more text, is the result or no number."""
    found = NUMBER.match(right)
    sign, digits, point, decimals = (found[name] for name in ("sign", "digits", "point", "decimals"))
    ended, size = found.end() < len(right), abs(result)
    if not digits and not decimals:
        return ended or bool(point) or (result < 0 if sign else len(right) <= SPACES)
    if bool(sign) != (result < 0):
        return False
    if result.denominator > 1 and _can_become_fraction(right, size):
        return True
    digits = digits or "0"
    whole, is_exact = digits.rstrip(","), 10**EXACT % result.denominator == 0
    number = whole.replace(",", "")
    unit = size.denominator  # of the last place, scaled so that all are whole numbers
    error = abs(int(number + decimals) * unit - size.numerator * 10 ** len(decimals))
    if whole in (number, f"{int(number):,}") and (error == 0 or (error < unit and not is_exact)):
        return True
    if ended:
        return False
    wholes = [(size.__floor__(), _decimals(size))] if is_exact else [(size.__floor__(), ""), (size.__ceil__(), "")]
    forms = [form for whole, rest in wholes for form in (f"{whole}{rest}", f"{whole:,}{rest}")]
    return any(form.startswith(digits + point + decimals) for form in forms)


def _can_become_fraction(right: str, size: Fraction) -> bool:
    """Whether what is written is the beginning of a fraction, a mixed number or, below 1, a percentage of this size."""
    whole, rest = divmod(size, 1)
    forms = [f"{size}", f"{whole} {rest}"] if whole else [f"{size}"]
    if not whole and 10**EXACT % (100 * size).denominator == 0:
        percentage = f"{(100 * size).__floor__()}{_decimals(100 * size)}"
        forms += [f"{percentage}%", f"{percentage} %"]
    written = right.lstrip(" -−")
    return any(form.startswith(written) or re.match(rf"{re.escape(form)}(?![\d/%])", written) for form in forms)


def _decimals(number: Fraction) -> str:
    """Point and decimals of a number with at most `EXACT` of them, empty for a whole one."""
    return f".{int(number % 1 * 10**EXACT):0{EXACT}}".rstrip("0").rstrip(".")
