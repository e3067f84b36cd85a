"""Graded predictions -> the figures of metrics.json. Pure.

Knows which figure belongs to which mode and which modes are compared; the figures themselves are `statistics`'.
"""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product

import numpy as np

from llm2.common.stats import (
    best_of_k,
    majority_curve,
    mcnemar,
    mean_intervals,
    paired_bootstrap,
    pass_at_k,
    weighted_majority_at_k,
    wilson_interval,
)

COMPARED = (("plain_greedy", "guided_greedy"), ("plain_sampling", "guided_sampling"))
# Figures of k samples: key in metrics.json -> the name of one of them, as paired tests and tables have it.
FIGURES = {"majority": "majority@{}", "pass": "pass@{}", "best_of": "best of {}", "weighted": "weighted@{}"}


def summarise(lines: dict[str, list[dict]], ks: Sequence[int], seed: int) -> dict:
    """`modes` and `paired` of metrics.json.

    Args:
        lines: for each mode its lines of predictions.jsonl, the same problems in the same order.
        ks: the k that weighted votes and paired tests are made for; majority@k and the others are there for every k.
    """
    curves = {mode: _curves(own, ks, seed) for mode, own in lines.items() if mode.endswith("sampling")}
    paired = []
    for a, b in COMPARED:
        if a in lines and b in lines:
            paired += _compare(a, b, lines, curves, ks, seed)
    modes = {mode: _mode(mode, own, curves.get(mode, {}), seed) for mode, own in lines.items()}
    return {"modes": modes, "paired": paired, "reported_k": list(ks)}


def _mode(mode: str, lines: Sequence[dict], curves: dict[tuple[str, int], list[float]], seed: int) -> dict:
    share = [_share(line, "correct") for line in lines]
    figures = {
        "accuracy": sum(share) / len(share),
        "ci95": _interval(mode, share, seed),
        "accuracy_strict": sum(_share(line, "correct_strict") for line in lines) / len(lines),
        **_cost(mode, lines),
    }
    if curves:
        table = np.array(list(curves.values())).T  # (N, F)
        for (figure, k), mean, interval in zip(curves, table.mean(axis=0), mean_intervals(table, seed), strict=True):
            figures.setdefault(f"{figure}_at", {})[str(k)] = float(mean)
            figures.setdefault(f"{figure}_ci95", {})[str(k)] = interval
    return figures


def _cost(mode: str, lines: Sequence[dict]) -> dict[str, float]:
    """Means a problem. A forward counts once for each row in it: so the cost does not depend on the batch size.

    The samples of a problem share the forward that reads the prompt; from then on System 1 reads a token a forward, and
    System 2 is asked where there is a choice. Scoring the finished solutions, for best of k, is counted by itself.
    """
    samples = [sample for line in lines for sample in line["samples"]]
    tokens, verified = (sum(sample[key] for sample in samples) for key in ("tokens", "verifier_forwards"))
    n = len(lines)
    return {
        "tokens_per_problem": tokens / n,
        "verifier_forwards_per_token": verified / max(tokens, 1),
        "system1_forwards_per_problem": 1 + (tokens - len(samples)) / n,
        "system2_forwards_per_problem": 1 + verified / n if mode.startswith("guided") else 0.0,
        "scoring_forwards_per_problem": sum(sample.get("score") is not None for sample in samples) / n,
    }


def _compare(
    a: str, b: str, lines: dict[str, list[dict]], curves: dict[str, dict], ks: Sequence[int], seed: int
) -> list[dict]:
    """Greedy by McNemar's exact test; figures of k samples, fractions a problem, by a paired bootstrap."""
    if a.endswith("greedy"):
        right = [[line["samples"][0]["correct"] for line in lines[mode]] for mode in (a, b)]
        return [{"a": a, "b": b, "metric": "accuracy", **asdict(mcnemar(*right))}]
    tested = [("majority", k) for k in ks] + [key for key in product(("best_of", "weighted"), ks) if key[1] > 1]
    shared = [key for key in tested if all(key in curves[mode] for mode in (a, b))]
    tables = [np.array([curves[mode][key] for key in shared]).T for mode in (a, b)]
    return [
        {"a": a, "b": b, "metric": FIGURES[figure].format(k), **asdict(test)}
        for (figure, k), test in zip(shared, paired_bootstrap(*tables, seed), strict=True)
    ]


def _curves(lines: Sequence[dict], ks: Sequence[int], seed: int) -> dict[tuple[str, int], list[float]]:
    """(figure, k) -> its value on each problem, for every k from 1 to the number of samples."""
    every = range(1, len(lines[0]["samples"]) + 1)
    votes = [majority_curve(_answers(line), _right_answer(line)) for line in lines]
    curves = {("majority", k): [curve[k - 1] for curve in votes] for k in every}
    for k in every:
        curves["pass", k] = [pass_at_k(len(every), sum(_each(line, "correct")), k) for line in lines]
    if all(sample.get("score") is not None for line in lines for sample in line["samples"]):
        for k in every:
            curves["best_of", k] = [best_of_k(_each(line, "score"), _each(line, "correct"), k) for line in lines]
        for k in ks:
            curves["weighted", k] = [
                weighted_majority_at_k(_answers(line), _weights(line), _right_answer(line), k, seed) for line in lines
            ]
    return curves


def _each(line: dict, key: str) -> list:
    return [sample[key] for sample in line["samples"]]


def _answers(line: dict) -> list[str | None]:
    return _each(line, "answer")


def _right_answer(line: dict) -> str | None:
    """What the correct samples answer: a grader gives equal answers one canonical form."""
    return next((sample["answer"] for sample in line["samples"] if sample["correct"]), None)


def _weights(line: dict) -> list[float]:
    """exp(score): the loss makes of scores the log-odds with which one beats another (Bradley and Terry, 1952)."""
    scores = np.array(_each(line, "score"))
    return np.exp(scores - scores.max()).tolist()


def _share(line: dict, key: str) -> float:
    return sum(_each(line, key)) / len(line["samples"])


def _interval(mode: str, share: Sequence[float], seed: int) -> tuple[float, float]:
    """Wilson's where each problem is right or wrong; where it is a share of samples, a bootstrap over problems."""
    if mode.endswith("greedy"):
        return wilson_interval(round(sum(share)), len(share))
    return mean_intervals(np.array(share)[:, None], seed)[0]
