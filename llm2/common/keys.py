"""Marks in the annotation of a config key: which input it names, and whether it may differ when a run resumes."""

from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, Literal, get_type_hints


@dataclass(frozen=True)
class Reads:
    """Marks a key that names an input of a run: a model or verifier, a file, code (MODULE:NAME), a results folder."""

    kind: Literal["model", "file", "code", "results"]


class Mark(Enum):
    """Further marks. A key without HOW or WHICH must not differ when a run resumes."""

    HOW = "how and where a run works; results do not depend on it"
    WHICH = "which results are computed; results in common with another choice are equal"
    GUIDED = "in plain modes only the verifier's scores depend on it, and what SEARCHED says"
    SAMPLED = "only sampling modes depend on it"
    SEARCHED = "of the plain modes only the search depends on it"
    SCORES = "the verifier's scores of samples depend on it"
    SHOWN = "always in metrics.json or on a verifier's card"
    TRAINER = "an argument of transformers' Trainer, under the same name"


def reads(config: Any) -> dict[str, str]:
    """Key -> kind of what it names, for the keys of a config that are marked with `Reads`."""
    notes = _annotations(type(config)).items()
    return {key: mark.kind for key, marks in notes for mark in marks if isinstance(mark, Reads)}


def select_keys(config: Any, *wanted: Mark) -> dict[str, Any]:
    """Key -> value, for the keys of a config that have at least one of these marks."""
    notes = _annotations(type(config)).items()
    return {key: getattr(config, key) for key, marks in notes if any(mark in wanted for mark in marks)}


@cache
def _annotations(config: type) -> dict[str, tuple]:
    """Key -> metadata of its annotation; pydantic's own `metadata` lacks some of it before 2.12."""
    hints = get_type_hints(config, include_extras=True)
    return {key: getattr(hints[key], "__metadata__", ()) for key in config.__dataclass_fields__}
