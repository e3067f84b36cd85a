"""Bad input is refused in one sentence: the cases of tests/torture that cost little, in this process."""

import pytest

from tests.torture.bad_input import Case, Stock, all_cases, attack

CASES = all_cases()


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Stock:
    return Stock(tmp_path_factory.mktemp("stock"))


@pytest.mark.parametrize("case", [c for c in CASES if not c.slow], ids=lambda case: f"{case.kind}-{case.name}")
def test_bad_input_is_refused_in_one_sentence_and_nothing_is_harmed(case: Case, stock, tmp_path):
    assert attack(case, tmp_path / "case", stock) is None


def test_there_are_at_least_80_cases_with_names_of_their_own():
    names = [(case.kind, case.name) for case in CASES]
    assert len(names) == len(set(names)) >= 80
