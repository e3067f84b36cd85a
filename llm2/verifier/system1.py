"""What training takes from System 1: the baseline of the held-out pairs, margins for the loss, the output embedding."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from llm2.common.distributed import dist_info
from llm2.common.loading import load_system1
from llm2.config import TrainConfig
from llm2.errors import UserError
from llm2.verifier.arguments import VerifierTrainingArguments
from llm2.verifier.pair_metrics import PairInfo, compute_metrics, system1_margins
from llm2.verifier.triplets import Example


class System1Measures(NamedTuple):
    """What training takes from System 1 before it loads the verifier."""

    metrics: dict[str, float]  # on the held-out pairs
    eval_margins: dict[int, float]  # of `system1_margins`; empty where this process does not need them
    train_margins: dict[int, float]  # the same; empty but for guided_beta
    unembedding: torch.Tensor | None  # (V, D); None without LM loss, or where it is tied to the input embedding


def measure_system1(
    model: str,
    args: TrainConfig | VerifierTrainingArguments,
    train_set: Sequence[Example],
    eval_set: Sequence[Example],
    pairs: Mapping[int, PairInfo],
    device: torch.device,
    best_by: str = "",
) -> System1Measures:
    """The main process reports the metrics; the others measure only what loss or choice of a checkpoint need.

    Of steps nothing is measured.
    """
    is_main, lm_loss, guided = dist_info().is_main, args.lm_loss_coef > 0, args.guided_beta is not None
    measured = (is_main or guided or best_by != "pair_accuracy") and not train_set[0].of_steps
    if not measured and not lm_loss:
        return System1Measures({}, {}, {}, None)
    system1 = load_system1(model, device)
    output = system1.get_output_embeddings()
    if lm_loss and getattr(output, "bias", None) is not None:  # Phi's, GPT-J's
        raise UserError(f"lm_loss_coef: the output layer of {model} has a bias, which the loss leaves out; expected 0")
    head, tied = output.weight, output.weight is system1.get_input_embeddings().weight
    margins = system1_margins(system1, eval_set) if measured else {}
    return System1Measures(
        {
            f"system1_{name}": value
            for name, value in (compute_metrics(margins, pairs) if is_main and measured and pairs else {}).items()
            if not name.startswith("pairs")
        },
        margins,
        system1_margins(system1, train_set) if guided else {},
        head.detach().float().cpu() if lm_loss and not tied else None,
    )
