"""The embedded testbed's word problems as a benchmark.

Knows the testbed's splits. Leaves making the problems to llm2/testbed/generator.py.
"""

from llm2.errors import UserError
from llm2.testbed.generator import SIZES, problems


def generated_records(split: str, limit: int | None = None) -> list[dict]:
    """The first `limit` records of a split, the same ones every time."""
    if split not in SIZES:
        raise UserError(f"testbed has no split {split!r}: expected one of {', '.join(SIZES)}")
    return problems(split, limit)
