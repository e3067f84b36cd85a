"""Bad input is refused in one sentence: the cases of tests/robustness that cost little, in this process."""

import re

import pytest

from tests.robustness.bad_input import Case, Stock, all_cases, attack, main_of

CASES = all_cases()


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Stock:
    return Stock(tmp_path_factory.mktemp("stock"))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", [c for c in CASES if not c.slow], ids=lambda case: f"{case.kind}-{case.name}")
def test_bad_input_is_refused_in_one_sentence_and_nothing_is_harmed(case: Case, stock, tmp_path):
    assert attack(case, tmp_path / "case", stock) is None


def test_there_are_at_least_80_cases_with_names_of_their_own():
    names = [(case.kind, case.name) for case in CASES]
    assert len(names) == len(set(names)) >= 80


def test_debug_shows_the_traceback(stock, tmp_path, monkeypatch, capsys):
    from llm2.errors import UserError

    for case in {case.kind: case for case in CASES if case.kind in ("YAML", "JSON Lines", "models")}.values():
        folder = tmp_path / case.kind
        folder.mkdir()
        monkeypatch.chdir(folder)
        arguments = case.make(folder, stock)
        with pytest.raises(UserError) as error:
            main_of(arguments[0])([*arguments, "--debug"])
        assert error.value.__traceback__ is not None and not re.search(
            r"^(llm2|experiments) ", capsys.readouterr().err, re.M
        )


def test_an_attack_notices_what_it_is_there_to_notice(stock, tmp_path):
    """Success, and another sentence."""

    def harmless(folder, stock):
        return ["generate", "output=out.jsonl", "limit=1"]

    def misspelt(folder, stock):
        return ["generate", "outptu=out.jsonl"]

    assert "exit status 0" in attack(Case("", "", harmless, ()), tmp_path / "a", stock)
    assert "expected ['output file']" in attack(Case("", "", misspelt, ("output file",)), tmp_path / "b", stock)
    assert attack(Case("", "", misspelt, ("did you mean 'output'",)), tmp_path / "c", stock) is None
