"""A line of the table of `scripts/torture.sh`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    what: str
    tried: int
    failed: int
    detail: str = ""
