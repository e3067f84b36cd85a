"""What word problems are made of, read from facts.toml: tables of facts, and the words that fill their sentences."""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Sentences = tuple[str, ...]  # wordings with words to fill in
Person = tuple[str, str, str]  # name, pronouns


@dataclass(frozen=True)
class Fact:
    """A sentence of a question, with the steps of the solution that follow from it (facts.toml)."""

    templates: Sentences
    calculations: tuple[tuple[str, Sentences], ...]  # ("given = n * k", sentences for it)
    numbers: dict[str, range]
    phrase: str
    weight: float


def _facts(entry: Mapping[str, Any]) -> Iterator[Fact]:
    """The fact of an entry of facts.toml, or those that it stands for."""
    for variant in DATA[entry["each"]] if "each" in entry else ({},):
        given = {"steps": (), "numbers": {}, "phrase": "", "weight": 1.0, **entry, **variant}
        steps = (_fill(step, variant).split("; ") for step in given["steps"])
        yield Fact(
            templates=tuple(_fill(text, variant) for text in given["say"]),
            calculations=tuple((formula, SENTENCES[name]) for formula, name in steps),
            numbers={name: range(low, high + 1, *step) for name, (low, high, *step) in given["numbers"].items()},
            phrase=given["phrase"],
            weight=given["weight"],
        )


def _fill(text: str, variant: Mapping[str, Any]) -> str:
    for name, value in variant.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
WORDS = {name: tuple(words) for name, words in DATA.pop("words").items()}
SENTENCES = {name: tuple(texts) for name, texts in DATA.pop("sentences").items()}
TABLES = {
    name: tuple(fact for entry in entries for fact in _facts(entry))
    for name, entries in DATA.items()
    if name not in ("fractions", "comparisons")
}
PEOPLE: tuple[Person, ...] = (
    *((name, "she", "her") for name in WORDS["women"]),
    *((name, "he", "his") for name in WORDS["men"]),
)
