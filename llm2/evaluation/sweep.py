"""Choose alpha, beta, top_k and temperature on a validation split, then evaluate them on the test split.

Knows the grid and the choice. Each of its points, and the final run, is an `evaluation` with its own results folder.
"""

import json
from dataclasses import fields, replace
from itertools import product
from pathlib import Path

from llm2.config import EvaluateConfig, SweepConfig
from llm2.errors import UserError
from llm2.evaluation.evaluate import evaluate

SWEPT = {"alpha": "alphas", "beta": "betas", "top_k": "top_ks", "temperature": "temperatures"}


def sweep(config: SweepConfig) -> dict | None:
    """Fill `config.output_dir` with the evaluation of the settings that were best on the validation split.

    Its metrics.json tells under `sweep` how they were chosen; the points' own results are in VALIDATION/POINT below it.
    Returns the metrics; None in the processes of `accelerate launch` other than the main one.
    """
    own = (config.split, config.data_file)
    if own == (config.validation_split, config.validation_file):
        raise UserError(
            f"settings are to be chosen on other problems than they are reported on, found {own[0]!r} twice"
        )
    points, measured = grid(config), []
    for point in points:
        metrics = evaluate(_on_validation(config, point))
        if metrics is not None:
            measured.append({**point, **_figure(metrics, config.choose_by)})
    chosen = _best(config, points)
    metrics = evaluate(replace(_as_evaluation(config), **chosen))
    if metrics is None:
        return None
    n = metrics_of(_on_validation(config, chosen))["n"]
    metrics["sweep"] = {
        "split": config.validation_split,
        "file": config.validation_file,
        "n": n,
        "mode": config.choose_by,
        "chosen": chosen,
        "points": measured,
    }
    Path(config.output_dir, "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def grid(config: SweepConfig) -> list[dict]:
    """All combinations of the swept settings; one that is not swept keeps its own value."""
    values = [getattr(config, several) or (getattr(config, one),) for one, several in SWEPT.items()]
    return [dict(zip(SWEPT, combination, strict=True)) for combination in product(*values)]


def metrics_of(config: EvaluateConfig) -> dict:
    return json.loads(Path(config.output_dir, "metrics.json").read_text())


def _best(config: SweepConfig, points: list[dict]) -> dict:
    """The point of the highest accuracy; of several the first in the order of the lists."""
    return max(
        points, key=lambda point: _figure(metrics_of(_on_validation(config, point)), config.choose_by)["accuracy"]
    )


def _figure(metrics: dict, mode: str) -> dict:
    """What decides, with its interval: greedy accuracy, or the vote of as many samples as are reported."""
    figures = metrics["modes"][mode]
    if mode.endswith("greedy"):
        return {"metric": "accuracy", "accuracy": figures["accuracy"], "ci95": figures["ci95"]}
    k = str(max(metrics["reported_k"]))
    return {
        "metric": f"majority@{k}",
        "accuracy": figures["majority_at"][k],
        "ci95": figures["majority_ci95"][k],
    }


def _as_evaluation(config: SweepConfig) -> EvaluateConfig:
    return EvaluateConfig(**{field.name: getattr(config, field.name) for field in fields(EvaluateConfig)})


def _on_validation(config: SweepConfig, point: dict) -> EvaluateConfig:
    name = "-".join(f"{key}={value}" for key, value in point.items())
    return replace(
        _as_evaluation(config),
        **point,
        output_dir=str(Path(config.output_dir, "validation", name)),
        split=config.validation_split,
        data_file=config.validation_file,
        limit=config.validation_limit,
        modes=(config.choose_by,),
        take_over=(),
        traced_samples=0,
        score_samples=False,
    )
