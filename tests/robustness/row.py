"""A line of the table that scripts/torture.sh prints."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    what: str  # was injected or tried
    tried: int
    failed: int
    detail: str = ""  # a figure in words
