"""The facts of word problems about shopping, wages and books: more tables like those of facts.py."""

from llm2.testbed import facts, words
from llm2.testbed.facts import NOTHING, Fact, Table

PURCHASES: Table = (
    Fact(
        ("{who} buys {n} {things} for ${p} each.", "{who} pays ${p} each for {n} {things}."),
        (("cost = n * p", words.COST),),
        {"n": range(2, 13), "p": range(2, 10)},
        weight=2.0,
    ),
    Fact(
        ("{who} buys {n} dozen {things} for ${p} each.",),
        (("many = n * 12", words.GETS), ("cost = many * p", words.COST)),
        {"n": range(2, 4), "p": range(2, 4)},
        facts.DOZEN,
        0.3,
    ),
)
MORE_PURCHASES: Table = (
    NOTHING,
    Fact(
        ("{He} also buys {n} {things2} for ${p} each.",),
        (("cost2 = n * p", words.COST2), ("cost = cost + cost2", words.PAYS)),
        {"n": range(2, 10), "p": range(2, 10)},
        weight=2.0,
    ),
    Fact(
        ("{He} also buys a book for ${p}.",),
        (("cost = cost + p", words.PAYS),),
        {"p": range(5, 20)},
    ),
)
PAYMENTS: Table = (
    Fact(("How much does {he} pay?",)),
    Fact(
        ("{He} has ${w}. How much money is left?",),
        (("left = w - cost", words.MONEY_LEFT),),
        {"w": range(30, 121, 5)},
    ),
    Fact(
        ("{He} and {his} friends share the cost. They are {n} people. How much does each pay?",),
        (("each = cost / n", words.EACH_PAYS),),
        {"n": range(2, 7)},
    ),
)

WAGES: Table = (
    Fact(
        ("{who} works {n} hours for ${p} an hour.", "{who} makes ${p} an hour and works {n} hours."),
        (("have = n * p", words.MAKES),),
        {"n": range(2, 13), "p": range(4, 10)},
    ),
    Fact(
        ("{who} works {n} hours a day for {m} days and makes ${p} an hour.",),
        (("hours = n * m", words.HOURS), ("have = hours * p", words.MAKES)),
        {"n": range(2, 7), "m": range(2, 6), "p": range(2, 7)},
    ),
)
SPENDING: Table = (
    Fact(("{He} buys a book for ${a}.",), (("have = have - a", words.LEFT),), {"a": range(3, 30)}, weight=1.5),
    Fact(("{He} already had ${a}.",), (("have = have + a", words.NOW),), {"a": range(5, 40)}),
    Fact(
        ("{He} gives each of {his} {n} friends ${k}.",),
        (("given = n * k", words.GIVES), ("have = have - given", words.LEFT)),
        {"n": range(2, 8), "k": range(2, 8)},
        facts.EACH_FRIEND,
        1.5,
    ),
    *(facts.taken_fraction(*part, ("{He} spends {fraction} of the money.",), words.SPENDS) for part in facts.PARTS),
)
MONEY_LEFT: Table = (Fact(("How much money does {he} have in the end?",)),)

BOOKS: Table = (
    Fact(("How many pages does {he} read?",)),
    Fact(
        ("The book has {b} pages. How many pages are left?",),
        (("rest = b - have", words.REST),),
        {"b": range(40, 151)},
        weight=2.0,
    ),
    Fact(
        ("The book has {b} pages. {He} reads the rest at {c} pages a day. How many more days does it take?",),
        (("rest = b - have", words.REST), ("more = rest / c", words.MORE_DAYS)),
        {"b": range(40, 151), "c": range(2, 10)},
        weight=2.0,
    ),
)
