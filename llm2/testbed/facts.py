"""Tables of facts for word problems about what people own: wording, ranges of numbers, arithmetic.

Facts about shopping, wages and books are in money.py.
"""

from dataclasses import dataclass, field

from llm2.testbed import words
from llm2.testbed.words import Sentences

Calculation = tuple[str, Sentences]  # ("given = n * k", sentences for it)


@dataclass(frozen=True)
class Fact:
    """A sentence of a question, with the steps of the solution that follow from it.

    A calculation `given = n * k` names a new quantity; its operands are numbers of this fact, quantities named earlier
    in the story, or constants.
    """

    templates: Sentences  # wordings of the sentence; one is drawn
    calculations: tuple[Calculation, ...] = ()
    numbers: dict[str, range] = field(default_factory=dict)  # each is drawn from its range
    phrase: str = ""  # a wording of the first calculation that a careless reader may misread
    weight: float = 1.0  # how often the fact is drawn, relative to others of its table


Table = tuple[Fact, ...]

# Wordings that careless readers misread
ALL_BUT = "all but"
BOXES_OF = "boxes of"
DOZEN = "dozen"
EACH_FRIEND = "each friend"
EVERY_OTHER_DAY = "every other day"
FEWER = "fewer"
FRACTION = "fraction"
HALF = "half as many"
MORE = "more"
TIMES = "times"
WEEKS = "weeks"

NOTHING = Fact(("",))

DAILY: Table = (
    Fact(
        ("{who} {gathers} {a} {things} a day for {n} days.", "For {n} days {who} {gathers} {a} {things} a day."),
        (("have = a * n", words.GATHERED),),
        {"a": range(2, 13), "n": range(2, 10)},
    ),
    Fact(
        ("{who} {gathers} {a} {things} every other day for {n} days.",),
        (("days = n / 2", words.DAYS), ("have = a * days", words.GATHERED)),
        {"a": range(2, 13), "n": range(4, 20, 2)},
        EVERY_OTHER_DAY,
        0.6,
    ),
    Fact(
        ("{who} {gathers} {a} {things} a day for {n} weeks.",),
        (("days = n * 7", words.DAYS), ("have = a * days", words.GATHERED)),
        {"a": range(2, 6), "n": range(2, 5)},
        WEEKS,
        0.4,
    ),
)

HOLDINGS: Table = (
    Fact(
        ("{who} has {have} {things}.", "There are {have} {things} in the bag of {who}."),
        (),
        {"have": range(10, 81)},
        weight=3.0,
    ),
    Fact(
        ("{who} has {n} {boxes} of {a} {things}.", "{who} has {n} {boxes}. In each are {a} {things}."),
        (("have = n * a", words.HAS),),
        {"n": range(2, 10), "a": range(3, 13)},
        BOXES_OF,
    ),
    Fact(
        ("{who} has {a} red {things} and {b} blue {things}.",),
        (("have = a + b", words.HAS),),
        {"a": range(5, 50), "b": range(5, 50)},
    ),
    Fact(("{who} has {n} dozen {things}.",), (("have = n * 12", words.HAS),), {"n": range(2, 9)}, DOZEN, 0.7),
)


def taken_fraction(word: str, parts: int, templates: Sentences, sentences: Sentences) -> Fact:
    return Fact(
        tuple(template.replace("{fraction}", word) for template in templates),
        ((f"given = have / {parts}", sentences), ("have = have - given", words.LEFT)),
        phrase=FRACTION,
        weight=0.5,
    )


PARTS = (("half", 2), ("a third", 3), ("a quarter", 4))

CHANGES: Table = (
    Fact(
        ("{He} buys {a} more {things}.", "Then {he} gets {a} more {things}."),
        (("have = have + a", words.NOW),),
        {"a": range(3, 40)},
        weight=1.5,
    ),
    Fact(
        ("{He} gives {a} {things} to {other}.", "Then {he} loses {a} {things}."),
        (("have = have - a", words.LEFT),),
        {"a": range(3, 40)},
        weight=1.5,
    ),
    Fact(
        ("{He} buys {n} {boxes} of {a} {things}.",),
        (("bought = n * a", words.GETS), ("have = have + bought", words.NOW)),
        {"n": range(2, 10), "a": range(2, 10)},
        BOXES_OF,
    ),
    Fact(
        ("{He} buys {n} dozen {things}.",),
        (("bought = n * 12", words.GETS), ("have = have + bought", words.NOW)),
        {"n": range(2, 6)},
        DOZEN,
        0.4,
    ),
    Fact(
        (
            "{He} gives each of {his} {n} friends {k} {things}.",
            "Each of {his} {n} friends gets {k} {things} from {who}.",
        ),
        (("given = n * k", words.GIVES), ("have = have - given", words.LEFT)),
        {"n": range(2, 10), "k": range(2, 10)},
        EACH_FRIEND,
        2.2,
    ),
    *(
        taken_fraction(
            *part,
            ("{He} gives {fraction} of the {things} to {other}.", "{He} loses {fraction} of the {things}."),
            words.GIVES,
        )
        for part in PARTS
    ),
)

CLOSINGS: Table = (
    Fact(("How many {things} does {who} have in the end?", "How many {things} does {he} have now?"), weight=2.0),
    Fact(
        ("{He} sells all the {things} for ${p} each. How much money does {he} make?",),
        (("money = have * p", words.MAKES),),
        {"p": range(2, 7)},
    ),
    Fact(
        ("{He} sells all but {k} of the {things} for ${p} each. How much money does {he} make?",),
        (("sold = have - k", words.SOLD), ("money = sold * p", words.MAKES)),
        {"k": range(2, 20), "p": range(2, 7)},
        ALL_BUT,
        1.2,
    ),
    Fact(
        ("{He} puts all the {things} in bags of {n}. How many bags does {he} need?",),
        (("bags = have / n", words.BAGS),),
        {"n": range(2, 10)},
    ),
    Fact(
        ("{He} shares the {things} with {n} friends. How many {things} does each friend get?",),
        (("each = have / n", words.SHARE),),
        {"n": range(2, 10)},
    ),
)


def comparisons(template: str, result: str, reference: str, sentences: Sentences) -> Table:
    """`{comparison}` in the template becomes "half as many apples as", "3 fewer apples than" and so on."""

    def fact(comparison: str, operation: str, phrase: str, weight: float, **numbers: range) -> Fact:
        calculation = (f"{result} = {reference} {operation}", sentences)
        return Fact((template.replace("{comparison}", comparison),), (calculation,), numbers, phrase, weight)

    return (
        fact("half as many {things} as", "/ 2", HALF, 2.0),
        fact("{k} fewer {things} than", "- k", FEWER, 1.2, k=range(2, 20)),
        fact("{k} more {things} than", "+ k", MORE, 1.5, k=range(2, 20)),
        fact("twice as many {things} as", "* 2", TIMES, 1.0),
        fact("{n} times as many {things} as", "* n", TIMES, 1.0, n=range(3, 6)),
    )


SECOND_PERSON = comparisons("{other} has {comparison} {who}.", "second", "have", words.SECOND_HAS)
THIRD_PERSON = comparisons("{third} has {comparison} {other}.", "third", "second", words.THIRD_HAS)
TWO_PEOPLE: Table = (
    Fact(("How many {things} does {other} have?",)),
    Fact(("How many {things} do they have altogether?",), (("total = have + second", words.ALTOGETHER),), weight=2.0),
    Fact(
        ("They sell all the {things} for ${p} each. How much money do they make?",),
        (("total = have + second", words.ALTOGETHER), ("money = total * p", words.THEY_MAKE)),
        {"p": range(2, 6)},
    ),
)
THREE_PEOPLE: Table = (
    Fact(("How many {things} does {third} have?",)),
    Fact(
        ("How many {things} do all three have altogether?",),
        (("both = have + second", words.BOTH), ("total = both + third", words.ALTOGETHER)),
    ),
)

SALES: Table = (Fact(("{who} sold {have} {things} in {month}.",), (), {"have": range(8, 61)}),)
SECOND_MONTH = comparisons("In {month2} {he} sold {comparison} in {month}.", "second", "have", words.SECOND_SOLD)
SALES_CLOSINGS: Table = (
    Fact(("How many {things} did {he} sell altogether?",), (("total = have + second", words.SOLD_IN_ALL),), weight=2.0),
    Fact(
        ("How much money did {he} make, at ${p} each?",),
        (("total = have + second", words.SOLD_IN_ALL), ("money = total * p", words.MAKES)),
        {"p": range(2, 6)},
    ),
)
