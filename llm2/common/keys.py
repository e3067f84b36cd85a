"""Marks in the annotation of a config key: what the key reads, and whether it may differ when a run resumes."""

from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, Literal, get_type_hints


@dataclass(frozen=True)
class Reads:
    """Marks a key that names what a run reads: a model or verifier, a file, code (MODULE:NAME), or a results folder."""

    kind: Literal["model", "file", "code", "results"]


class Mark(Enum):
    """Further marks. A key without HOW or WHICH must not differ when a run resumes."""

    HOW = "how and where a run works: no result depends on it"
    WHICH = "which results there are; those that a smaller or larger choice has too are the same"
    GUIDED = "nothing depends on it in plain modes, but for the verifier's scores"
    SAMPLED = "nothing depends on it in greedy modes"
    SCORES = "the verifier's scores of samples depend on it"
    SHOWN = "stands in metrics.json or on a verifier's card, whatever its value"
    TRAINER = "an argument of transformers' Trainer, under the same name"


def reads(config: Any) -> dict[str, str]:
    """Key -> kind of what it names, for the keys of a config that are marked with `Reads`."""
    notes = _annotations(type(config)).items()
    return {key: mark.kind for key, marks in notes for mark in marks if isinstance(mark, Reads)}


def marked(config: Any, *wanted: Mark) -> dict[str, Any]:
    """Key -> value, for the keys of a config that have at least one of these marks."""
    notes = _annotations(type(config)).items()
    return {key: getattr(config, key) for key, marks in notes if any(mark in wanted for mark in marks)}


@cache
def _annotations(config: type) -> dict[str, tuple]:
    """Key -> what is said of it in its annotation; pydantic's own `metadata` drops some of it before 2.12."""
    hints = get_type_hints(config, include_extras=True)
    return {key: getattr(hints[key], "__metadata__", ()) for key in config.__dataclass_fields__}
