"""Choose alpha, beta, top_k and temperature on a validation split, then evaluate them on the test split.

Each point of the grid, and the final run, is an evaluation with a results folder.
"""

import json
from dataclasses import fields, replace
from itertools import product
from pathlib import Path

from llm2.common.claim import lock_output
from llm2.common.files import write_text
from llm2.common.home import without_home
from llm2.common.inputs import digests
from llm2.common.loading import with_batch_dtype
from llm2.config import EvaluateConfig, Mode, SweepConfig
from llm2.errors import UserError
from llm2.evaluation.evaluate import evaluate
from llm2.verifier.load import trained_beta

SWEPT = {"alpha": "alphas", "beta": "betas", "top_k": "top_ks", "temperature": "temperatures"}


def sweep(config: SweepConfig) -> dict | None:
    """Choose the best settings on the validation split and evaluate them into `config.output_dir`.

    The key `sweep` of metrics.json says how they were chosen; the results of each point are in OUTPUT/validation/POINT.
    Returns the metrics in the main process, None in the others.
    """
    same_file = config.data_file == config.validation_file
    if same_file and (config.data_file is not None or config.split == config.validation_split):
        problems = config.data_file or config.split
        raise UserError(f"settings must be chosen on other problems than they are reported on, found {problems} twice")
    config = with_batch_dtype(config)  # once, not for each point
    if config.beta is None and config.verifier is not None and not config.betas:
        config = replace(config, beta=trained_beta(config.verifier))
    points, inputs = [], digests(config)
    for settings in grid(config):
        point = validation_config(config, settings)
        with lock_output(point.output_dir):
            evaluate(point)
        metrics = json.loads(Path(point.output_dir, "metrics.json").read_text(encoding="utf-8"))  # in every process
        points.append({**settings, **_accuracy(metrics, config.choose_by)})
    best = max(points, key=lambda point: point["accuracy"])  # ties: the first in the order of the lists
    chosen = {key: best[key] for key in SWEPT}
    validation_n = metrics["n"]
    metrics = evaluate(replace(_evaluation(config), **chosen))
    if metrics is None:
        return None
    metrics["sweep"] = {
        "split": config.validation_split,
        "file": without_home(config.validation_file),
        "inputs": inputs.get("validation_file", {}),
        "n": validation_n,
        "mode": config.choose_by,
        "chosen": chosen,
        "points": points,
    }
    write_text(Path(config.output_dir, "metrics.json"), json.dumps(metrics, indent=2) + "\n")
    return metrics


def grid(config: SweepConfig) -> list[dict]:
    """All combinations of the swept settings; a setting without a list keeps its value."""
    values = [getattr(config, several) or (getattr(config, one),) for one, several in SWEPT.items()]
    return [dict(zip(SWEPT, combination, strict=True)) for combination in product(*values)]


def validation_config(config: SweepConfig, settings: dict) -> EvaluateConfig:
    """The evaluation of one point of the grid."""
    name = "-".join(f"{key}={value}" for key, value in settings.items())
    return replace(
        _evaluation(config),
        **settings,
        output_dir=str(Path(config.output_dir, "validation", name)),
        split=config.validation_split,
        data_file=config.validation_file,
        limit=config.validation_limit,
        modes=(config.choose_by,),
        reuse_from=(),
        traced_samples=0,
        score_samples=False,
    )


def _evaluation(config: SweepConfig) -> EvaluateConfig:
    return EvaluateConfig(**{field.name: getattr(config, field.name) for field in fields(EvaluateConfig)})


def _accuracy(metrics: dict, mode: Mode) -> dict:
    """The accuracy that decides, with its interval: greedy accuracy, or majority@k of the largest reported k."""
    figures = metrics["modes"][mode]
    if not mode.sampled:
        return {"metric": "accuracy", "accuracy": figures["accuracy"], "ci95": figures["ci95"]}
    k = str(max(metrics["reported_k"]))
    return {"metric": f"majority@{k}", "accuracy": figures["majority_at"][k], "ci95": figures["majority_ci95"][k]}
