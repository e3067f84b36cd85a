"""The report: hand-made metrics in, table, plots and page out."""

import copy
import json

import pytest

from llm2.config import Mode
from llm2.errors import UserError
from llm2.evaluation.report import read_metrics, write_report
from llm2.evaluation.report import table as render_table
from llm2.evaluation.report.pack import pack
from llm2.evaluation.report.plots import figures
from llm2.evaluation.report.read import parse

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


def table(metrics: dict) -> str:
    return render_table(parse(metrics, "the metrics"))


def subset(*names):
    return {**METRICS, "modes": {name: METRICS["modes"][name] for name in names}, "paired": []}


def row(text, label):
    """The cells of the row that begins with the label."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{label} ")]
    return [cell for cell in line.removeprefix(label).split("  ") if cell.strip()]


def cells(text, label):
    return [cell.strip() for cell in row(text, label)]


def test_a_row_holds_plain_guided_difference_relative_error_reduction_p_and_n():
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


def test_without_errors_the_error_reduction_is_a_dash():
    assert cells(table(METRICS), "pass@20") == ["100.0", "100.0", "+0.0", "-", "-", "300"]


def test_a_figure_that_got_worse_has_a_negative_error_reduction():
    metrics = copy.deepcopy(METRICS)
    metrics["modes"]["guided_greedy"]["accuracy"] = 0.4
    assert cells(table(metrics), "greedy")[2:4] == ["-10.0", "-20 %"]


def test_the_paired_tests_and_their_fixed_and_broken_problems_are_named():
    text = table(METRICS)
    assert "guided_greedy against plain_greedy, accuracy: exact McNemar, p = 2e-12; 100 fixed, 10 broken" in text
    assert "majority@20: sign flips, p = 0.012\n" in text + "\n"


def test_a_figure_that_was_not_measured_is_a_dash():
    assert cells(table(subset("guided_greedy")), "greedy") == ["-", "80.0 [75.1, 84.1]", "-", "-", "-", "300"]
    assert "majority" not in table(subset(*GREEDY))
    assert "greedy" not in table(subset(*SAMPLING))


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    "metrics", [METRICS, subset(*GREEDY), subset(*SAMPLING), subset("plain_greedy"), subset("guided_sampling")]
)
def test_any_subset_of_modes_is_reported(metrics, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert write_report(tmp_path) == table(metrics)
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_writing_the_report_prints_nothing(tmp_path, capsys):
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    write_report(tmp_path)
    assert capsys.readouterr() == ("", "")


SAMPLED = {
    **METRICS,
    "reported_k": [1, 20],
    "settings": {"alpha": 0.1, "beta": 0.5},
    "modes": {
        name: {
            **mode,
            "best_of_at": {"1": 0.4, "20": 0.8},
            "weighted_at": {"20": 0.85},
            "tokens_per_problem": 1210.0,
            "system1_forwards_per_problem": 1191.0,
            "system2_forwards_per_problem": 240.5,
            "scoring_forwards_per_problem": 20.0,
        }
        for name, mode in METRICS["modes"].items()
    },
}
POINT = {"alpha": 0.1, "top_k": None, "temperature": 1.0, "ci95": [0.5, 0.9]}
SWEPT = {
    **SAMPLED,
    "sweep": {
        "split": "validation",
        "n": 500,
        "mode": "guided_greedy",
        "chosen": {"alpha": 0.1, "beta": 0.5, "top_k": None, "temperature": 1.0},
        "points": [{**POINT, "beta": beta, "accuracy": 0.7} for beta in (0.25, 0.5, 1.0)],
    },
}


def test_only_the_reported_k_have_rows_and_one_sample_is_not_the_best_of_itself():
    lines = table(SAMPLED).splitlines()
    labels = [line.split("  ")[0] for line in lines if line.startswith(("majority", "weighted", "best", "pass"))]
    assert labels == ["majority@1", "majority@20", "weighted@20", "best of 20", "pass@1", "pass@20"]


def test_the_cost_of_each_mode_is_below_the_table():
    assert cells(table(SAMPLED), "System 2 forwards") == ["240.5"] * 4
    assert cells(table(SAMPLED), "tokens") == ["1,210.0"] * 4
    assert "cost" not in table(METRICS)


def test_the_report_names_the_split_that_chose_the_settings_and_the_one_it_reports():
    text = " ".join(table(SWEPT).split())
    assert "chosen on the validation split (n = 500) by guided_greedy among 3: alpha 0.1, beta 0.5" in text
    assert "reported on the test split" in text


def test_accuracy_cost_and_sweep_are_drawn_if_measured(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(SWEPT))
    write_report(tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"accuracy.png", "cost.png", "sweep.png"}


TRACE = {
    "tokens": ["Ann", " has", " </script>", " 4", "<|eot_id|>"],
    "scores": [0.5, -1.25, 2.0, 0.0, 0.25],
    "choices": [
        {
            "at": 1,
            "candidates": [" had", " has"],
            "logprobs": [-0.2, -1.7],
            "scores": [-2.0, 3.5],
            "chosen": 1,
            "changed": True,
        }
    ],
}


def write_results(folder, n: int, metrics=METRICS, samples: int = 3) -> None:
    """n problems, a fifth of each kind: fixed, fixed, broken, both wrong, both right."""
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with open(folder / "predictions.jsonl", "w") as predictions, open(folder / "traces.jsonl", "w") as traces:
        for i in range(n):
            for mode in metrics["modes"]:
                right = i % 5 == 4 or (i % 5 < 2 if Mode(mode).guided else i % 5 == 2)
                count = samples if Mode(mode).sampled else 1
                sample = {"text": "Ann has </script> 4", "answer": "4", "correct": right, "tokens": 5, "score": 0.3}
                line = {"id": f"test-{i}", "mode": mode}
                prediction = {"question": f"How many <b>{i}</b>?", "gold": "4", "samples": [sample] * count}
                predictions.write(json.dumps({**line, **prediction}) + "\n")
                traces.write(json.dumps({**line, "traces": [TRACE] * count}) + "\n")


def packed(folder) -> dict:
    page = (folder / "report.html").read_text()
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


def test_the_page_holds_every_problem_token_by_token(tmp_path):
    write_results(tmp_path, 10)
    write_report(tmp_path)
    data = packed(tmp_path)
    assert [problem[0] for problem in data["problems"]] == [f"test-{i}" for i in range(10)]
    _, question, gold, modes = data["problems"][3]
    assert (question, gold, set(modes)) == ("How many <b>3</b>?", "4", set(METRICS["modes"]))
    assert [len(modes[mode]) for mode in data["modes"]] == [1, 1, 3, 3]
    answer, right, tokens, score, (ids, scores, choices) = modes["guided_greedy"][0]
    assert (answer, right, tokens, score) == ("4", 0, 5, 0.3)
    assert [data["vocabulary"][i] for i in ids] == TRACE["tokens"]
    assert scores == [50, -125, 200, 0, 25]
    ((at, candidates, logprobs, choice_scores, chosen, changed),) = choices
    assert (at, [data["vocabulary"][i] for i in candidates], chosen, changed) == (1, [" had", " has"], 1, 1)
    assert (logprobs, choice_scores) == ([-20, -170], [-200, 350])
    assert data["scale"] == [-1.25, 0.25, 2.0]


def test_the_page_needs_no_network_and_no_text_breaks_out_of_it(tmp_path):
    write_results(tmp_path, 2, metrics=SWEPT)
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "://" not in page and "url(//" not in page
    assert page.count("</script>") == 2 and "<b>0</b>" not in page


@pytest.mark.parametrize(("max_bytes", "greedy", "sampled"), [(10**7, 1, 8), (20000, 1, 2), (4000, 0, 0)])
def test_samples_are_left_out_until_the_page_fits(max_bytes, greedy, sampled, tmp_path):
    write_results(tmp_path, 20, samples=8)
    text, shown = pack(tmp_path, parse(METRICS, "here"), max_bytes)
    problem = json.loads(text)["problems"][0][3]
    assert shown == sampled and (shown == 0 or len(text.encode()) <= max_bytes)
    bodies = {mode: [body for *_, body in problem[mode]] for mode in ("guided_greedy", "plain_sampling")}
    assert [isinstance(body, list) for body in bodies["plain_sampling"]] == [True] * sampled + [False] * (8 - sampled)
    assert bodies["plain_sampling"][max(1, sampled) :] == [None] * (8 - max(1, sampled)), "votes are all there"
    assert isinstance(bodies["guided_greedy"][0], list) == bool(greedy)


def test_a_results_folder_without_predictions_still_has_its_page(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    write_report(tmp_path)
    assert packed(tmp_path)["problems"] == []


def test_without_modes_nothing_is_drawn():
    assert figures(parse({**METRICS, "modes": {}}, "the metrics")) == {}


def test_majority_is_drawn_at_odd_and_reported_k():
    """At even k votes tie more often, so a curve through all k would be a staircase."""
    majority = {str(k): 0.5 for k in range(1, 21)}
    mode = {**METRICS["modes"]["plain_sampling"], "majority_at": majority, "majority_ci95": {}}
    metrics = {**METRICS, "reported_k": [1, 10, 20], "modes": {"plain_sampling": mode}}
    (axes,) = figures(parse(metrics, "the metrics"))["accuracy"].axes
    assert [int(k) for k in axes.lines[0].get_xdata()] == [1, 3, 5, 7, 9, 10, 11, 13, 15, 17, 19, 20]


def test_no_marker_of_a_legend_stands_among_the_measurements():
    points = [{**POINT, "beta": beta, "alpha": alpha, "accuracy": 0.7} for beta in (0.25, 1.0) for alpha in (0.1, 0.2)]
    metrics = {**SWEPT, "sweep": {**SWEPT["sweep"], "points": points}}
    drawn = figures(parse(metrics, "the metrics"))
    assert drawn.keys() == {"accuracy", "cost", "sweep"}
    for figure in drawn.values():
        figure.draw_without_rendering()
        for legend, axes in ((axes.get_legend(), axes) for axes in figure.axes if axes.get_legend()):
            assert not legend.get_window_extent().overlaps(axes.get_window_extent())
            assert figure.bbox.containsx(legend.get_window_extent().x1) and legend.get_window_extent().y0 >= 0
    assert all(figure.axes[-1].get_legend() for figure in drawn.values())


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
            json.dumps({**METRICS, "modes": {"beam": {"accuracy": 0.5}}}),
            "'beam', expected: input should be 'plain_greedy'",
        ),
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


def test_without_matplotlib_the_table_is_there_and_says_what_is_missing(tmp_path, monkeypatch):
    write_results(tmp_path, 3)
    monkeypatch.setattr("llm2.evaluation.report.find_spec", lambda name: None)
    printed = write_report(tmp_path)
    assert "greedy" in printed and "pip install 'llm2[report]'" in printed and not (tmp_path / "report.html").exists()
