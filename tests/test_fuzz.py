"""A few inputs for each property of tests/robustness/fuzz.py; `bash scripts/torture.sh fuzz` tries 100,000."""

import pytest

from tests.robustness.fuzz import PROPERTIES
from tests.robustness.fuzz_decoder import PROPERTY
from tests.robustness.property import fuzz

INPUTS = {"requests to the decoder, against its slow twin": 4, "metrics damaged, plots drawn": 3}  # 60 of the others


@pytest.mark.one_in(3)
@pytest.mark.parametrize("each", [*PROPERTIES, PROPERTY], ids=lambda each: each.what)
def test_the_property_holds_for_random_inputs(each, tmp_path):
    inputs = INPUTS.get(each.what, 60)
    row = fuzz(each, tmp_path, inputs / each.inputs)
    assert row.failed == 0, row.detail
    assert row.tried >= inputs / 2
