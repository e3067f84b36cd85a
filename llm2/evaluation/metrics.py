"""Compute the figures of metrics.json from graded predictions; the statistics are in llm2/common/stats.py."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product

import numpy as np

from llm2.common.stats import (
    PairedTest,
    best_of_k,
    majority_curve,
    mcnemar,
    mean_intervals,
    paired_bootstrap,
    pass_at_k,
    vote_weights,
    weighted_majority_at_k,
    wilson_interval,
)
from llm2.config import Mode

# Pairs of modes to compare: plain, guided.
GREEDY = (Mode.PLAIN_GREEDY, Mode.GUIDED_GREEDY)
SEARCH = (Mode.PLAIN_SEARCH, Mode.GUIDED_SEARCH)
SAMPLING = (Mode.PLAIN_SAMPLING, Mode.GUIDED_SAMPLING)
# Figures of k samples: key in metrics.json -> label in paired tests and tables.
FIGURES = {"majority": "majority@{}", "weighted": "weighted@{}", "best_of": "best of {}", "pass": "pass@{}"}

Curves = dict[tuple[str, int], list[float]]  # (figure, k) -> its value on each problem


def summarise(lines: dict[Mode, list[dict]], ks: Sequence[int], seed: int) -> dict:
    """`modes` and `paired` of metrics.json.

    Args:
        lines: the lines of predictions.jsonl of each mode: the same problems in the same order.
        ks: the k of weighted votes and paired tests; other figures are computed for every k.
    """
    curves = {mode: _curves(lines[mode], ks, seed) for mode in lines if mode.sampled}
    modes = {mode: _mode_figures(mode, lines[mode], curves.get(mode, {}), seed) for mode in lines}
    paired = []
    for pair in (GREEDY, SEARCH):
        if all(mode in lines for mode in pair):
            paired.append(_compare_single(pair, lines))
    if all(mode in lines for mode in SAMPLING):
        paired += _compare_sampling(curves, ks, seed)
    return {"modes": modes, "paired": paired, "reported_k": list(ks)}


def _mode_figures(mode: Mode, lines: Sequence[dict], curves: Curves, seed: int) -> dict:
    correct = [_share(line, "correct") for line in lines]
    if mode.sampled:
        ci95 = mean_intervals(np.array(correct)[:, None], seed)[0]  # of shares: bootstrap over problems
    else:
        ci95 = wilson_interval(round(sum(correct)), len(correct))
    figures = {
        "accuracy": sum(correct) / len(correct),
        "ci95": ci95,
        "accuracy_strict": sum(_share(line, "correct_strict") for line in lines) / len(lines),
        **_cost(mode, lines),
    }
    if curves:
        table = np.array(list(curves.values())).T  # (N, F)
        for (figure, k), mean, interval in zip(curves, table.mean(axis=0), mean_intervals(table, seed), strict=True):
            figures.setdefault(f"{figure}_at", {})[str(k)] = float(mean)
            figures.setdefault(f"{figure}_ci95", {})[str(k)] = interval
    return figures


def _cost(mode: Mode, lines: Sequence[dict]) -> dict[str, float]:
    """Means per problem. A forward counts once for each row in it, so the cost does not depend on the batch size.

    The samples of a problem share the forward that reads the prompt. After it System 1 takes one forward per token, but
    for the token that begins a branch of a search, and System 2 one per token with a choice. Scoring finished
    solutions, for best of k, is counted separately.
    """
    samples = [sample for line in lines for sample in line["samples"]]
    counted = ("tokens", "verifier_forwards", "verifier_tokens")
    tokens, verifier_forwards, read = (sum(sample.get(key, 0) for sample in samples) for key in counted)
    branches = sum(sample.get("solutions", 1) - 1 for sample in samples)
    n = len(lines)
    return {
        "tokens_per_problem": tokens / n,
        "verifier_forwards_per_token": verifier_forwards / max(tokens, 1),
        "verifier_tokens_per_token": read / max(tokens, 1),
        "system1_forwards_per_problem": 1 + (tokens - len(samples) - branches) / n,
        "system2_forwards_per_problem": 1 + verifier_forwards / n if verifier_forwards else 0.0,
        "scoring_forwards_per_problem": sum(sample.get("score") is not None for sample in samples) / n,
    }


def _compare_single(pair: tuple[Mode, Mode], lines: dict[Mode, list[dict]]) -> dict:
    """McNemar's exact test, for modes with one solution a problem."""
    correct = [[line["samples"][0]["correct"] for line in lines[mode]] for mode in pair]
    return _pair(pair, "accuracy", mcnemar(*correct))


def _compare_sampling(curves: dict[Mode, Curves], ks: Sequence[int], seed: int) -> list[dict]:
    """A paired bootstrap over problems for each figure of both modes; best of 1 and weighted@1 equal majority@1."""
    tested = [("majority", k) for k in ks] + [key for key in product(("best_of", "weighted"), ks) if key[1] > 1]
    shared = [key for key in tested if all(key in curves[mode] for mode in SAMPLING)]
    tables = [np.array([curves[mode][key] for key in shared]).T for mode in SAMPLING]  # (N, F) each
    tests = paired_bootstrap(*tables, seed)
    return [_pair(SAMPLING, FIGURES[figure].format(k), test) for (figure, k), test in zip(shared, tests, strict=True)]


def _pair(modes: tuple[Mode, Mode], metric: str, test: PairedTest) -> dict:
    return {"a": modes[0], "b": modes[1], "metric": metric, **asdict(test)}


def _curves(lines: Sequence[dict], ks: Sequence[int], seed: int) -> Curves:
    """Weighted votes for `ks`, the other figures for every k from 1 to the number of samples."""
    all_ks = range(1, len(lines[0]["samples"]) + 1)
    votes = [majority_curve(voting(line), right_answer(line)) for line in lines]
    curves = {("majority", k): [curve[k - 1] for curve in votes] for k in all_ks}
    for k in all_ks:
        curves["pass", k] = [pass_at_k(len(all_ks), sum(_values(line, "correct")), k) for line in lines]
    if all(sample.get("score") is not None for line in lines for sample in line["samples"]):
        for k in all_ks:
            curves["best_of", k] = [best_of_k(ranking(line), _values(line, "correct"), k) for line in lines]
        for k in ks:
            curves["weighted", k] = [
                weighted_majority_at_k(voting(line), vote_weights(_values(line, "score")), right_answer(line), k, seed)
                for line in lines
            ]
    return curves


def _values(line: dict, key: str) -> list:
    return [sample[key] for sample in line["samples"]]


def voting(line: dict) -> list[str | None]:
    """The samples' answers, None for those that `accept` refused."""
    return [sample["answer"] if sample.get("accepted", True) else None for sample in line["samples"]]


def ranking(line: dict) -> list[float | None]:
    """The samples' scores, below all others for those that `accept` refused; None for samples without one."""
    scores = [sample.get("score") for sample in line["samples"]]
    refused = [not sample.get("accepted", True) for sample in line["samples"]]
    return [-math.inf if no and score is not None else score for no, score in zip(refused, scores, strict=True)]


def _share(line: dict, key: str) -> float:
    return sum(_values(line, key)) / len(line["samples"])


def right_answer(line: dict) -> str | None:
    """The answer of the correct samples, which all have the same string; None if there are none."""
    return next((sample["answer"] for sample in line["samples"] if sample["correct"]), None)
