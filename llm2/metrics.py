"""Graded predictions -> the figures of metrics.json. Pure.

Knows which figure belongs to which mode and which modes are compared; the figures themselves are `statistics`'.
"""

from collections.abc import Sequence
from dataclasses import asdict

from llm2.grading import extract_answer
from llm2.statistics import majority_at_k, mcnemar, mean_interval, paired_permutation, pass_at_k, wilson_interval

COMPARED = (("plain_greedy", "guided_greedy"), ("plain_sampling", "guided_sampling"))


def summarise(lines: dict[str, list[dict]], ks: Sequence[int], seed: int) -> dict:
    """`modes` and `paired` of metrics.json.

    Args:
        lines: for each mode its lines of predictions.jsonl, the same problems in the same order.
        ks: the k of majority@k and pass@k in the sampling modes.
    """
    paired = []
    for a, b in COMPARED:
        if a in lines and b in lines:
            paired += _compare(a, b, lines, ks, seed)
    return {"modes": {mode: _mode(mode, own, ks, seed) for mode, own in lines.items()}, "paired": paired}


def _mode(mode: str, lines: Sequence[dict], ks: Sequence[int], seed: int) -> dict:
    samples = [sample for line in lines for sample in line["samples"]]
    tokens = sum(sample["tokens"] for sample in samples)
    share = [_share(line, "correct") for line in lines]
    figures = {
        "accuracy": sum(share) / len(share),
        "ci95": _interval(mode, share, seed),
        "accuracy_strict": sum(_share(line, "correct_strict") for line in lines) / len(lines),
        "tokens_per_problem": tokens / len(lines),
        "verifier_forwards_per_token": sum(sample["verifier_forwards"] for sample in samples) / max(tokens, 1),
    }
    if mode.endswith("sampling"):
        majority = {str(k): _majority(lines, k) for k in ks}
        passed = {str(k): _passed(lines, k) for k in ks}
        figures |= {
            "majority_at": {k: sum(values) / len(values) for k, values in majority.items()},
            "majority_ci95": {k: mean_interval(values, seed) for k, values in majority.items()},
            "pass_at": {k: sum(values) / len(values) for k, values in passed.items()},
            "pass_ci95": {k: mean_interval(values, seed) for k, values in passed.items()},
        }
    return figures


def _compare(a: str, b: str, lines: dict[str, list[dict]], ks: Sequence[int], seed: int) -> list[dict]:
    """Greedy by McNemar's exact test; majority@k, a chance a problem, by a paired permutation test."""
    if a.endswith("greedy"):
        right = [[line["samples"][0]["correct"] for line in lines[mode]] for mode in (a, b)]
        return [{"a": a, "b": b, "metric": "accuracy", **asdict(mcnemar(*right))}]
    return [
        {"a": a, "b": b, "metric": f"majority@{k}"}
        | asdict(paired_permutation(_majority(lines[a], k), _majority(lines[b], k), seed))
        for k in ks
    ]


def _share(line: dict, key: str) -> float:
    return sum(sample[key] for sample in line["samples"]) / len(line["samples"])


def _interval(mode: str, share: Sequence[float], seed: int) -> tuple[float, float]:
    """Wilson's where each problem is right or wrong; where it is a share of samples, a bootstrap over problems."""
    return wilson_interval(round(sum(share)), len(share)) if mode.endswith("greedy") else mean_interval(share, seed)


def _majority(lines: Sequence[dict], k: int) -> list[float]:
    golds = [extract_answer(f"#### {line['gold']}") for line in lines]
    answers = [[sample["answer"] for sample in line["samples"]] for line in lines]
    return [majority_at_k(own, gold, k) for own, gold in zip(answers, golds, strict=True)]


def _passed(lines: Sequence[dict], k: int) -> list[float]:
    return [pass_at_k(len(line["samples"]), sum(s["correct"] for s in line["samples"]), k) for line in lines]
