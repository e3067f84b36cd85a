"""The report: hand-made metrics in, the table's lines and the plot out."""

import copy
import json

import pytest

from llm2.errors import UserError
from llm2.report import markdown_table, plot, read_metrics, table, write_report

METRICS = {
    "benchmark": "testbed",
    "split": "test",
    "n": 300,
    "seed": 0,
    "versions": {"torch": "2"},
    "modes": {
        "plain_greedy": {"accuracy": 0.5, "ci95": [0.444, 0.556], "accuracy_strict": 0.49, "tokens_per_problem": 60.5},
        "guided_greedy": {"accuracy": 0.8, "ci95": [0.751, 0.841], "accuracy_strict": 0.79},
        "plain_sampling": {
            "accuracy": 0.4,
            "ci95": [0.35, 0.45],
            "majority_at": {"1": 0.4, "5": 0.5, "20": 0.6},
            "majority_ci95": {"20": [0.544, 0.654]},
            "pass_at": {"1": 0.4, "20": 1.0},
        },
        "guided_sampling": {
            "accuracy": 0.7,
            "ci95": [0.65, 0.75],
            "majority_at": {"1": 0.7, "5": 0.8, "20": 0.9},
            "majority_ci95": {"20": [0.861, 0.929]},
            "pass_at": {"1": 0.7, "20": 1.0},
        },
    },
    "paired": [
        {
            "a": "plain_greedy",
            "b": "guided_greedy",
            "metric": "accuracy",
            "difference": 0.3,
            "p": 2e-12,
            "test": "exact McNemar",
            "fixed": 100,
            "broken": 10,
        },
        {
            "a": "plain_sampling",
            "b": "guided_sampling",
            "metric": "majority@20",
            "difference": 0.3,
            "p": 0.0123,
            "test": "sign flips",
            "fixed": None,
            "broken": None,
        },
    ],
}
SAMPLING = ("plain_sampling", "guided_sampling")
GREEDY = ("plain_greedy", "guided_greedy")


def subset(*names):
    return {**METRICS, "modes": {name: METRICS["modes"][name] for name in names}, "paired": []}


def row(text, label):
    """The cells of the row that begins with the label."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{label} ")]
    return [cell for cell in line.removeprefix(label).split("  ") if cell.strip()]


def cells(text, label):
    return [cell.strip() for cell in row(text, label)]


def test_a_row_holds_both_sides_their_difference_the_error_cut_p_and_n():
    # (0.8 - 0.5) / (1 - 0.5) = 60 % of plain's errors are gone; majority@20: (0.9 - 0.6) / 0.4 = 75 %
    expected = ["50.0 [44.4, 55.6]", "80.0 [75.1, 84.1]", "+30.0", "60 %", "< 0.001", "300"]
    assert cells(table(METRICS), "greedy") == expected
    expected = ["60.0 [54.4, 65.4]", "90.0 [86.1, 92.9]", "+30.0", "75 %", "0.012", "300"]
    assert cells(table(METRICS), "majority@20") == expected


def test_rows_come_in_order_of_k_and_the_table_fits_a_terminal():
    lines = table(METRICS).splitlines()
    labels = [line.split("  ")[0] for line in lines if line.startswith(("greedy", "majority", "pass"))]
    expected = ["greedy", "greedy, strict", "majority@1", "majority@5", "majority@20", "pass@1", "pass@20"]
    assert labels == expected
    assert max(len(line) for line in lines) <= 100


def test_without_an_error_there_is_nothing_to_cut():
    assert cells(table(METRICS), "pass@20") == ["100.0", "100.0", "+0.0", "-", "-", "300"]


def test_a_figure_that_got_worse_shows_as_a_negative_cut():
    metrics = copy.deepcopy(METRICS)
    metrics["modes"]["guided_greedy"]["accuracy"] = 0.4
    assert cells(table(metrics), "greedy")[2:4] == ["-10.0", "-20 %"]


def test_the_paired_tests_and_the_problems_that_changed_sides_are_named():
    text = table(METRICS)
    assert "guided_greedy against plain_greedy, accuracy: exact McNemar, p = 2e-12; 100 fixed, 10 broken" in text
    assert "majority@20: sign flips, p = 0.012\n" in text + "\n"


def test_a_side_that_was_not_measured_is_a_dash():
    assert cells(table(subset("guided_greedy")), "greedy") == ["-", "80.0 [75.1, 84.1]", "-", "-", "-", "300"]
    assert "majority" not in table(subset(*GREEDY))
    assert "greedy" not in table(subset(*SAMPLING))


def test_the_markdown_table_has_the_same_cells():
    line = "| greedy | 50.0 [44.4, 55.6] | 80.0 [75.1, 84.1] | +30.0 | 60 % | < 0.001 | 300 |"
    assert line in markdown_table(METRICS).splitlines()


@pytest.mark.parametrize(
    "metrics", [METRICS, subset(*GREEDY), subset(*SAMPLING), subset("plain_greedy"), subset("guided_sampling")]
)
def test_any_subset_of_modes_is_reported(metrics, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert write_report(tmp_path) == table(metrics)
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_prints_nothing(tmp_path, capsys):
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    write_report(tmp_path)
    assert capsys.readouterr() == ("", "")


def test_nothing_to_plot_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="nothing to plot"):
        plot({**METRICS, "modes": {}}, tmp_path / "accuracy.png")
    assert not (tmp_path / "accuracy.png").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*metrics\.json: No such file"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected an object"),
        ('{"benchmark": "gsm8k", "split": "test", "n": 3}', "the key 'modes' is missing"),
        (json.dumps({**METRICS, "n": 0}), "key 'n': found 0"),
        (
            json.dumps({**METRICS, "modes": {"plain_greedy": {"accuracy": 57.8}}}),
            r"plain_greedy\.accuracy': found 57.8",
        ),
        (json.dumps({**METRICS, "modes": {"plain_sampling": {"accuracy": 0.5, "majority_at": {"five": 0.5}}}}), "five"),
    ],
)
def test_an_ill_formed_file_is_named_with_what_is_wrong(text, message, tmp_path):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_metrics(tmp_path / "metrics.json")
    assert str(tmp_path / "metrics.json") in str(caught.value)
    assert "\n" not in str(caught.value)
