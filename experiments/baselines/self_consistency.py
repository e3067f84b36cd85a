"""Self-consistency at equal generated tokens: as many plain samples vote as cost what another mode generates.

A fixed k for all problems: the largest whose samples generate at most the other mode's tokens per problem, at least 1.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from experiments.baselines.config import SelfConsistencyConfig
from llm2.common.files import write_text
from llm2.common.inputs import digests
from llm2.common.stats import majority_curve, mean_intervals, paired_bootstrap
from llm2.config import Mode
from llm2.errors import UserError
from llm2.evaluation.metrics import right_answer, voting
from llm2.evaluation.predictions import read_mode


def compare(config: SelfConsistencyConfig) -> dict:
    """Write `config.output`: both accuracies with intervals, tokens per problem and a paired test; returns it."""
    inputs = digests(config)
    plain = read(config.samples, Mode.PLAIN_SAMPLING)
    other = read(config.against, config.mode)
    if [line["id"] for line in plain] != [line["id"] for line in other]:
        raise UserError(f"{config.samples} and {config.against}: expected the same problems in the same order")
    other_k = config.majority_at if config.mode.sampled else 1
    budget = other_k * tokens_per_sample(other)
    k = max(1, int(budget / tokens_per_sample(plain)))
    if k > (found := len(plain[0]["samples"])):
        raise UserError(
            f"{config.samples}: {budget:.0f} tokens a problem pay for {k} samples, found {found}; "
            f"evaluate num_samples={k}"
        )
    accuracies = np.array([votes(plain, k), votes(other, other_k)]).T  # (N, 2)
    (test,) = paired_bootstrap(accuracies[:, :1], accuracies[:, 1:], config.seed)
    intervals = mean_intervals(accuracies, config.seed)
    sides = zip(("self_consistency", "against"), (k, other_k), (plain, other), accuracies.T, intervals, strict=True)
    result = {
        name: {
            "majority_at": votes_at,
            "accuracy": float(column.mean()),
            "ci95": interval,
            "tokens_per_problem": votes_at * tokens_per_sample(lines),
        }
        for name, votes_at, lines, column, interval in sides
    }
    result |= {"n": len(plain), "mode": config.mode, "paired": asdict(test), "inputs": inputs}
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    write_text(config.output, json.dumps(result, indent=2) + "\n")
    return result


def read(folder: str, mode: Mode) -> list[dict]:
    lines = read_mode(Path(folder), mode)
    if not lines:
        raise UserError(f"{folder}: expected predictions of the mode {mode}, found none")
    return lines


def tokens_per_sample(lines: Sequence[dict]) -> float:
    tokens = [sample["tokens"] for line in lines for sample in line["samples"]]
    return sum(tokens) / len(tokens)


def votes(lines: Sequence[dict], k: int) -> list[float]:
    """majority@k of each problem."""
    return [majority_curve(voting(line), right_answer(line))[k - 1] for line in lines]
