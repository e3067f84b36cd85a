"""Held-out pairs: where each stands and of what kind its gold token is, System 1's own margins, and the figures.

The figures are the same whatever batch or rank a pair was scored in: a pair is known by its number in its file.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm2.common.stats import wilson_interval
from llm2.verifier.loss import pair_accuracy, pairwise_loss
from llm2.verifier.triplets import Example

PARTS = 5  # of a solution, by which accuracy is told
KINDS = ("digit", "operator", "word", "other")
OPERATOR = re.compile(r"[-+*/=<>%^×÷−]+")


class Pair(NamedTuple):
    """What the figures want to know of a pair."""

    part: int  # of the solution in which it stands, from 1 to PARTS
    kind: str  # of its gold token, one of KINDS


def describe(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> dict[int, Pair]:
    """Every pair of the examples by its number."""
    found = {}
    for example in examples:
        length = len(example.ids) - example.start
        for offset, triplet in enumerate(example.triplets):
            part = 1 + max(triplet.position - example.start, 0) * PARTS // length
            found[example.number + offset] = Pair(part, kind(tokenizer.decode([triplet.gold])))
    return found


def kind(text: str) -> str:
    """Of a token: a digit if it holds one, an operator if it is nothing else, a word if it holds a letter."""
    text = text.strip()
    if any(character.isdigit() for character in text):
        return "digit"
    if OPERATOR.fullmatch(text):
        return "operator"
    return "word" if any(character.isalpha() for character in text) else "other"


def figures(margins: Mapping[int, float], pairs: Mapping[int, Pair]) -> dict[str, float]:
    """Accuracy with its 95 % interval, loss and mean margin; accuracy and number of pairs by part and by kind.

    Args:
        margins: score of gold less score of negative, by the pair's number.
        pairs: those to be told of; each has its margin.
    """
    values = torch.tensor([margins[number] for number in pairs], dtype=torch.float64)
    accuracy = pair_accuracy(values)
    low, high = wilson_interval(round(accuracy * len(values)), len(values))
    told = {
        "pair_accuracy": accuracy,
        "pair_accuracy_low": low,
        "pair_accuracy_high": high,
        "pair_loss": pairwise_loss(values, torch.ones_like(values)).item(),
        "mean_margin": values.mean().item(),
        "pairs": len(values),
    }
    groups = {f"part_{part}": [pair.part == part for pair in pairs.values()] for part in range(1, PARTS + 1)}
    groups |= {name: [pair.kind == name for pair in pairs.values()] for name in KINDS}
    for name, members in groups.items():
        if any(members):
            told[f"pair_accuracy_{name}"] = pair_accuracy(values[torch.tensor(members)])
            told[f"pairs_{name}"] = sum(members)
    return told


def table(metrics: Mapping[str, float]) -> str:
    """What training.json tells of groups of pairs, the verifier beside System 1, for a person to read."""
    lines = [f"{'pairs':>12}{'verifier':>12}{'System 1':>12}{'n':>8}"]
    for name in ["", *(f"_part_{part}" for part in range(1, PARTS + 1)), *(f"_{name}" for name in KINDS)]:
        if f"eval_pairs{name}" in metrics:
            own, theirs = (metrics[f"{who}_pair_accuracy{name}"] for who in ("eval", "system1"))
            label = name.strip("_").replace("_", " ") or "all"
            lines.append(f"{label:>12}{own:>12.1%}{theirs:>12.1%}{metrics[f'eval_pairs{name}']:>8.0f}")
    return "\n".join(lines)


@torch.inference_mode()
def system1_margins(system1: PreTrainedModel, examples: Sequence[Example]) -> dict[int, float]:
    """log p(gold) - log p(negative) in System 1, by the pair's number: the baseline that a verifier has to beat.

    The two differ by their logits alone, so that only these rows of the output embedding are used.
    """
    head, margins = system1.get_output_embeddings(), {}
    for example in tqdm(examples, desc="System 1 on the held-out pairs", unit="solution"):
        ids = torch.tensor([example.ids], device=system1.device)
        position, gold, negative = torch.tensor(example.triplets, device=ids.device).unbind(-1)  # (M,)
        hidden = system1.base_model(ids, use_cache=False).last_hidden_state[0, position - 1].float()  # (M, D)
        own = (hidden * (head.weight[gold] - head.weight[negative]).float()).sum(-1)
        if head.bias is not None:
            own = own + head.bias[gold] - head.bias[negative]
        margins |= zip(range(example.number, example.number + len(own)), own.tolist(), strict=True)
    return margins
