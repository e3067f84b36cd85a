"""What a study writes: tables in Markdown, comparisons and correlations in sentences, all figures as JSON, plots."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from scipy import stats

from experiments.study.bootstrap import SeedsTest
from experiments.study.config import StudyConfig
from experiments.study.results import Result, in_one_column, publish, results
from experiments.study.summary import Comparison, Row, comparisons, drop_seen, rows
from llm2.common.files import write_text
from llm2.errors import UserError

HEADINGS = {"sampling": "majority of all samples", "sampling best": "best score of all samples"}


def write_summary(config: StudyConfig) -> str:
    """Write the tables, the data, the runs' outcomes and the plots; returns the tables."""
    every = results(config)
    if not every:
        raise UserError(f"{config.output_dir}: expected evaluations, found none that is done")
    path = Path(config.report)
    path.parent.mkdir(parents=True, exist_ok=True)
    publish(config, every)
    found = in_one_column(every)
    summary, compared = rows(config, found), comparisons(config, found)
    sentences = [*map(sentence, compared), *correlations(config, found)]
    lines, data = [*tables(config, summary), *(f"- {each}" for each in sentences)], as_json(summary, compared)
    if config.seen_problems:
        others = rows(config, drop_seen(config, found))
        lines += [f"\nWithout the first {config.seen_problems:,} problems\n"]
        lines += tables(replace(config, columns={}), others)  # whose figures are of all problems
        data["unseen"] = as_json(others, [])["rows"]
    text = "\n".join(lines).rstrip("\n") + "\n"
    write_text(path.with_suffix(".md"), text)
    write_text(path.with_suffix(".json"), json.dumps(data, indent=1) + "\n")
    from experiments.study.plot import draw, draw_curves, draw_rows, save  # matplotlib is an extra

    for name, plot in config.plots.items():
        save(draw(config, plot, summary), path.with_name(f"{path.name}_{name}.svg"))
    if not config.plots:
        save((draw_curves if config.curves else draw_rows)(config, summary), path.with_suffix(".svg"))
    return text


def tables(config: StudyConfig, summary: Sequence[Row]) -> Iterator[str]:
    """One table, or one for each way of decoding."""
    if config.across is None:
        yield table(config, summary)
    else:
        yield from across(config, summary)


def table(config: StudyConfig, summary: Sequence[Row]) -> str:
    """A line for each row: accuracies in % with 95 % intervals, p against the baseline, figures."""
    axes = [axis for axis in config.axes if axis != config.over]
    seeds = [] if config.over is None else [f"{config.over}s"]
    columns = _columns(summary)
    lines = [[*axes, *seeds, *(f"{_heading(column)}, %" for column in columns), *config.columns.values()]]
    for row in summary:
        labels = [row.values.get(axis, "") for axis in axes]
        cells = [_accuracy(row.accuracies.get(name), row.against_baseline.get(name)) for name in columns]
        numbers = [_number(row.figures.get(name)) for name in config.columns]
        lines.append([*labels, *[str(row.seeds)] * len(seeds), *cells, *numbers])
    return _markdown(lines)


def across(config: StudyConfig, summary: Sequence[Row]) -> Iterator[str]:
    """A table for each column of accuracies and each figure: the values of the axis `across` stand side by side."""
    axes = [axis for axis in config.axes if axis not in (config.over, config.across)]
    values = list(config.axes[config.across])

    def side_by_side(heading: str, texts: Sequence[str]) -> str:
        lines: dict[tuple[str, ...], list[str]] = {}
        for row, text in zip(summary, texts, strict=True):
            if text:
                key = tuple(row.values.get(axis, "") for axis in axes)
                cells = lines.setdefault(key, ["not run"] * len(values))
                cells[values.index(row.values[config.across])] = text
        return f"{heading}\n\n" + _markdown([[*axes, *values], *([*key, *cells] for key, cells in lines.items())])

    for column in _columns(summary):
        tests = [row.accuracies.get(column) for row in summary]
        seeds = [f" ({test.seeds})" if test and config.over is not None else "" for test in tests]
        yield side_by_side(
            f"{_heading(column)}, %", [_accuracy(test) + n for test, n in zip(tests, seeds, strict=True)]
        )
    for name, heading in config.columns.items():
        yield side_by_side(heading, [_number(row.figures.get(name)) for row in summary])


def sentence(comparison: Comparison) -> str:
    """The comparison in words."""
    first, second, others = (
        ", ".join(values.values()) for values in (comparison.first, comparison.second, comparison.others)
    )
    tests = (f"{_heading(column)} {_difference(test)}" for column, test in comparison.differences.items())
    return f"{others}: {first} less {second}: {'; '.join(tests)}".removeprefix(": ")


def correlations(config: StudyConfig, found: Sequence[Result]) -> Iterator[str]:
    """A sentence for each figure of `correlate` and each column that at least three runs have."""
    for name in config.correlate:
        for column in dict.fromkeys(column for result in found for column in result.problems):
            pairs = [
                (one.figures[name], one.problems[column].mean())
                for one in found
                if name in one.figures and column in one.problems
            ]
            if len(pairs) >= 3:
                spearman, pearson = (
                    stats.spearmanr(pairs).statistic,
                    stats.pearsonr(*zip(*pairs, strict=True)).statistic,
                )
                yield f"{name} and {column} over {len(pairs)} runs: Spearman {spearman:.2f}, Pearson {pearson:.2f}"


def as_json(summary: Sequence[Row], compared: Sequence[Comparison]) -> dict[str, list[dict[str, Any]]]:
    """Rows and comparisons as plain values."""
    lines = [
        {
            **row.values,
            "seeds": row.seeds,
            **row.figures,
            "accuracy": {column: test._asdict() for column, test in row.accuracies.items()},
            "against_baseline": {column: test._asdict() for column, test in row.against_baseline.items()},
        }
        for row in summary
    ]
    pairs = [
        asdict(each) | {"differences": {column: test._asdict() for column, test in each.differences.items()}}
        for each in compared
    ]
    return {"rows": lines, "comparisons": pairs}


def _columns(summary: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in summary for column in row.accuracies))


def _heading(column: str) -> str:
    end = column.removeprefix("plain ").removeprefix("guided ")
    return column.removesuffix(end) + HEADINGS.get(end, end)


def _accuracy(test: SeedsTest | None, against: SeedsTest | None = None) -> str:
    if test is None:
        return ""
    text = f"{100 * test.mean:.1f} [{100 * test.ci95[0]:.1f}, {100 * test.ci95[1]:.1f}]"
    return text if against is None else f"{text}; {100 * against.mean:+.1f}, p = {against.p:.2g}"


def _difference(test: SeedsTest) -> str:
    low, high = (100 * bound for bound in test.ci95)
    return f"{100 * test.mean:+.1f} [{low:+.1f}, {high:+.1f}], p = {test.p:.2g}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _markdown(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in lines]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in padded) + "\n"
