"""Metrics of held-out pairs: accuracy, margin and loss, by fifth of the solution and by kind of the gold token.

Pairs are identified by their number in the file, so the metrics do not depend on batches or ranks.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm2.common.stats import wilson_interval
from llm2.errors import UserError
from llm2.verifier.loss import pair_accuracy, pairwise_loss
from llm2.verifier.triplets import Example

PARTS = range(1, 6)  # fifths of a solution
DECIDED = 0.95  # a held-out soft-target pair counts if gold is better with at least this probability
BETAS = (0.25, 0.5, 1.0, 2.0)  # weights of the score to try on held-out pairs and forks
BENIGN, HARMFUL = 0.1, 0.35  # a benign token's loss of quality against gold is at most, a harmful one's at least this
SUPPRESSED = 1.0  # guidance suppresses a token if it lowers its log odds against gold by more
KINDS = ("digit", "operator", "word", "other")
LABELS = ("wrong", "right")
OPERATOR = re.compile(r"[-+*/=<>%^×÷−]+")


class PairInfo(NamedTuple):
    """The groups to which a pair belongs."""

    part: int  # of the solution, one of PARTS
    kind: str  # of the gold token, one of KINDS
    label: str | None = None  # of a step, one of LABELS


def pair_info(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> dict[int, PairInfo]:
    """The pairs by id; with soft targets only those whose gold is better with DECIDED probability. All steps."""
    info = {}
    for example in examples:
        _refuse_twice(example, info)
        length, of_steps = len(example.ids) - example.start, example.of_steps
        gold_better = example.gold_better or [1.0] * len(example.triplets)
        for pair_id, (triplet, probability) in enumerate(
            zip(example.triplets, gold_better, strict=True), start=example.first_pair_id
        ):
            if probability < DECIDED and not of_steps:
                continue
            part = 1 + max(triplet.position - example.start, 0) * len(PARTS) // length
            label = LABELS[int(probability)] if of_steps else None
            info[pair_id] = PairInfo(part, token_kind(tokenizer.decode([triplet.gold])), label)
    return info


def _refuse_twice(example: Example, seen: Mapping[int, Any]) -> None:
    """Raise UserError for pairs numbered as earlier ones: each file counts from 0, and what is known of a pair is found
    by its number."""
    if example.first_pair_id in seen:
        raise UserError(
            f"the pair {example.first_pair_id} stands twice; expected the examples of load_examples(into=...)"
        )


def token_kind(text: str) -> str:
    """The kind of a token: digit if it contains one, operator if it is nothing else, word if it contains a letter."""
    text = text.strip()
    if any(character.isdigit() for character in text):
        return "digit"
    if OPERATOR.fullmatch(text):
        return "operator"
    return "word" if any(character.isalpha() for character in text) else "other"


def compute_metrics(margins: Mapping[int, float], pairs: Mapping[int, PairInfo]) -> dict[str, float]:
    """Accuracy with its 95 % interval, loss and mean margin; accuracy and number of pairs by part, kind and label.

    A step's margin is its score; of a wrong one it is negated, so that accuracy is the share of right signs.

    Args:
        margins: score of gold minus score of negative, by pair id, for at least all `pairs`.
        pairs: the pairs to evaluate.
    """
    signed = [-margins[i] if pair.label == "wrong" else margins[i] for i, pair in pairs.items()]
    values = torch.tensor(signed, dtype=torch.float64)
    accuracy = pair_accuracy(values)
    low, high = wilson_interval(round(accuracy * len(values)), len(values))
    metrics = {
        "pair_accuracy": accuracy,
        "pair_accuracy_low": low,
        "pair_accuracy_high": high,
        "pair_loss": pairwise_loss(values, torch.ones_like(values)).item(),
        "mean_margin": values.mean().item(),
        "pairs": len(values),
    }
    groups = {f"part_{part}": [pair.part == part for pair in pairs.values()] for part in PARTS}
    groups |= {kind: [pair.kind == kind for pair in pairs.values()] for kind in KINDS}
    groups |= {label: [pair.label == label for pair in pairs.values()] for label in LABELS}
    for name, members in groups.items():
        if any(members):
            metrics[f"pair_accuracy_{name}"] = pair_accuracy(values[torch.tensor(members)])
            metrics[f"pairs_{name}"] = sum(members)
    return metrics


def guided_metrics(
    margins: Mapping[int, float], pairs: Iterable[int], system1: Mapping[int, float]
) -> dict[str, float]:
    """Loss and accuracy of guided margins, z + beta * s, with the best of BETAS by loss; accuracy of z alone.

    If System 1 alone orders the pairs better, adding the score can only make its choices worse.

    Args:
        margins: score of gold minus score of negative, by pair id.
        pairs: the pairs to evaluate.
        system1: from `system1_margins`.
    """
    ids = list(pairs)
    scores, z = (torch.tensor([values[i] for i in ids], dtype=torch.float64) for values in (margins, system1))
    loss, beta = min((pairwise_loss(z + beta * scores, torch.ones_like(z)).item(), beta) for beta in BETAS)
    return {
        "guided_pair_loss": loss,
        "guided_pair_accuracy": pair_accuracy(z + beta * scores),
        "guided_pair_accuracy_plain": pair_accuracy(z),
        "guided_beta": beta,
    }


class Rival(NamedTuple):
    """A plausible token beside the gold token of a fork."""

    pair_id: int
    quality_gap: float  # gold's quality minus this token's, from rollouts
    system1_margin: float  # log p(gold) - log p(token) in System 1


def fork_rivals(examples: Iterable[Example], margins: Mapping[int, float]) -> list[list[Rival]]:
    """The rivals of gold at each position; a pair without qualities counts as a loss of 1.

    Args:
        margins: from `system1_margins`.
    """
    forks = []
    for example in examples:
        rivals: dict[int, list[Rival]] = {}
        gaps = example.quality_gaps or [1.0] * len(example.triplets)
        for pair_id, (triplet, gap) in enumerate(zip(example.triplets, gaps, strict=True), start=example.first_pair_id):
            rivals.setdefault(triplet.position, []).append(Rival(pair_id, gap, margins[pair_id]))
        forks += rivals.values()
    return forks


def choice_quality(forks: Sequence[Sequence[Rival]], margins: Mapping[int, float], beta: float) -> float:
    """Mean over forks of the quality of the token that guided greedy decoding would choose, minus gold's.

    Args:
        margins: score of gold minus score of the rival, by pair id.
    """
    total = 0.0
    for rivals in forks:
        # Guided logits relative to gold's: the token with the lowest sum of margins is chosen if it is below 0.
        lowest, gap = min((rival.system1_margin + beta * margins[rival.pair_id], rival.quality_gap) for rival in rivals)
        total -= gap * (lowest < 0)
    return total / len(forks)


def choice_metrics(forks: Sequence[Sequence[Rival]], margins: Mapping[int, float]) -> dict[str, float]:
    """The best `choice_quality` over BETAS and its beta, System 1's alone, and `calibration` with that beta.

    Choice quality predicts guided accuracy better than pair accuracy: it includes the cost of a wrong choice and the
    effect of overconfident scores on ties.
    """
    quality, beta = max((choice_quality(forks, margins, beta), -beta) for beta in BETAS)
    return {
        "choice_quality": quality,
        "choice_beta": -beta,
        "choice_quality_plain": choice_quality(forks, margins, 0.0),
        "forks": len(forks),
        **calibration(forks, margins, -beta),
    }


def calibration(forks: Sequence[Sequence[Rival]], margins: Mapping[int, float], beta: float) -> dict[str, float]:
    """How margins agree with measured losses of quality: Spearman's rank correlation over all rivals of gold, and the
    shares of benign and of harmful rivals that guidance suppresses. Undefined ones are left out."""
    gaps = np.array([rival.quality_gap for rivals in forks for rival in rivals])
    pulls = beta * np.array([margins[rival.pair_id] for rivals in forks for rival in rivals])
    metrics = {}
    if np.ptp(gaps) and np.ptp(pulls):
        metrics["margin_spearman"] = float(stats.spearmanr(gaps, pulls).statistic)
    for name, members in (("benign", gaps <= BENIGN), ("harmful", gaps >= HARMFUL)):
        if members.any():
            metrics |= {f"{name}_suppressed": float((pulls[members] > SUPPRESSED).mean()), name: int(members.sum())}
    return metrics


def table(metrics: Mapping[str, float]) -> str:
    """A table of the verifier and, on pairs, System 1 on each group, from the metrics in training.json."""
    of_pairs = "system1_pair_accuracy" in metrics
    measured = {"eval": "verifier", "system1": "System 1"} if of_pairs else {"eval": "verifier"}
    heads = ["pairs" if of_pairs else "steps", *measured.values()]
    lines = ["".join(f"{head:>12}" for head in heads) + f"{'n':>8}"]
    for name in ["", *(f"_part_{part}" for part in PARTS), *(f"_{kind}" for kind in (*KINDS, *LABELS))]:
        if f"eval_pairs{name}" in metrics:
            label = name.strip("_").replace("_", " ") or "all"
            shares = "".join(f"{metrics[f'{who}_pair_accuracy{name}']:>12.1%}" for who in measured)
            lines.append(f"{label:>12}{shares}{metrics[f'eval_pairs{name}']:>8.0f}")
    return "\n".join(lines)


class WithSystem1Margins(Sequence[Example]):
    """Adds System 1's margins to the pairs of examples, for the loss of guided margins."""

    def __init__(self, examples: Sequence[Example], margins: Mapping[int, float]) -> None:
        self.examples, self.margins = examples, margins

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        example = self.examples[index]
        ids = range(example.first_pair_id, example.first_pair_id + len(example.triplets))
        return example._replace(system1_margins=[self.margins[pair_id] for pair_id in ids])


@torch.inference_mode()
def system1_margins(system1: PreTrainedModel, examples: Sequence[Example]) -> dict[int, float]:
    """log p(gold) - log p(negative) in System 1, by pair id: the baseline of a verifier."""
    margins = {}
    for example in tqdm(examples, desc="System 1 on the pairs", unit="solution"):
        _refuse_twice(example, margins)
        ids = torch.tensor([example.ids], device=system1.device)
        position, gold, negative = torch.tensor(example.triplets, device=ids.device).unbind(-1)  # (M,)
        wanted, rows = (position - 1).unique(return_inverse=True)
        # The model's own logits: some families scale or cap what the output layer gives.
        logits = system1(ids, use_cache=False, logits_to_keep=wanted).logits[0, rows].float()  # (M, V)
        margin = (logits.gather(-1, gold[:, None]) - logits.gather(-1, negative[:, None])).squeeze(-1)
        margins |= enumerate(margin.tolist(), start=example.first_pair_id)
    return margins
