"""The README.md of a trained verifier: front matter for the hub, how to load, data, settings and held-out metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import yaml

from llm2.common.config_file import as_dict
from llm2.common.inputs import SHOWN, Digests
from llm2.common.keys import Mark, reads, select_keys
from llm2.common.loading import is_local
from llm2.config import TrainConfig
from llm2.verifier.pair_metrics import table
from llm2.verifier.triplets import Summary

CARD = """---
{header}---

# Verifier of {base}

A token-level process verifier: System 2 of verifier-guided decoding (LLM2, arXiv 2412.20372). It scores the plausible
next tokens of System 1, `{base}`, from which it was trained.

    from llm2 import LLM2
    llm2 = LLM2.from_pretrained("{load}", "path/to/this/folder")

| training | |
|---|---|
{rows}

{held_out}

{table}
"""
PAIRS = """Held-out pairs in which the gold token is preferred to the negative one (n = {n:,.0f}): verifier {verifier},
System 1 {system1}. By fifth of the solution and by kind of the gold token:"""
STEPS = """Held-out steps whose label is the sign of their score (n = {n:,.0f}): {verifier}. By fifth of
the solution, by kind of the step's last token and by label:"""


def model_card(
    config: TrainConfig, inputs: Digests, metrics: Mapping[str, float], data: Sequence[tuple[str, Summary]]
) -> str:
    """The text of the card, with only the last component of local paths.

    Args:
        inputs: digests of the training's inputs.
        metrics: as in training.json.
        data: path and counts of each data file.
    """
    local = is_local(config.model)
    base = Path(config.model).name if local else config.model
    header = {"library_name": "llm2", "tags": ["llm2", "process-verifier", config.kind]}
    rows = [(f"`{Path(path).name}`", f"{counts}, {counts.dropped:,} beyond max_length") for path, counts in data]
    rows += [("solutions", f"{metrics['train_solutions']:,} in training, {metrics['eval_solutions']:,} held out")]
    rows += [("optimizer steps", f"{metrics['steps']:,}; the best on the held-out pairs: {metrics['best_step']:,}")]
    values = as_dict(config) | {"chat_template": config.chat_template and Path(config.chat_template).name}
    elsewhere = {*select_keys(config, Mark.HOW), *reads(config)} - {"chat_template"}
    always = select_keys(config, Mark.SHOWN).keys()
    shown = always | {key.name for key in fields(config) if values[key.name] != key.default}
    rows += [(f"`{name}`", value) for name, value in values.items() if name in shown - elsewhere]
    for key, files in inputs.items():
        rows += [(f"SHA-256 of `{Path(name).name}` ({key})", digest[:SHOWN]) for name, digest in files.items()]
    if "eval_choice_beta" in metrics:
        rows += [("beta that chooses the best tokens at held-out forks", f"{metrics['eval_choice_beta']:g}")]
    rows += [(package, version(package)) for package in ("torch", "transformers", "peft")]
    accuracies = {}
    for name, prefix in (("verifier", "eval"), ("system1", "system1")):
        if f"{prefix}_pair_accuracy" in metrics:
            share, low, high = (metrics[f"{prefix}_pair_accuracy{end}"] for end in ("", "_low", "_high"))
            accuracies[name] = f"{share:.1%} [95 % interval {low:.1%}, {high:.1%}]"
    held_out = PAIRS if "system1" in accuracies else STEPS
    return CARD.format(
        header=yaml.safe_dump(header if local else {"base_model": config.model, **header}, sort_keys=False),
        base=base,
        load=f"path/to/{base}" if local and base != "testbed" else base,
        rows="\n".join(f"| {name} | {value} |" for name, value in rows),
        held_out=held_out.format(n=metrics["eval_pairs"], **accuracies),
        table="\n".join(f"    {line}" for line in table(metrics).splitlines()),
    )
