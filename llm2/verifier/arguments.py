"""The arguments of a VerifierTrainer, and the new verifier that they describe."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from llm2.common.architecture import examine, refuse_too_long
from llm2.common.config_file import as_dict, difference
from llm2.common.home import without_home
from llm2.common.loading import changes_logits, is_local, load_config, load_language_model, model_path, vocabulary_size
from llm2.common.same_tokenizer import require_same_tokenizer
from llm2.config import Kind, TrainConfig, VerifierSpec
from llm2.errors import UserError, first_misfit, quote
from llm2.verifier.load import load_verifier, require_same_template, verifier_config
from llm2.verifier.model import ProcessVerifier
from llm2.verifier.triplets import FORMATS, Example


@dataclass
class VerifierTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments and the keys of `llm2 train` that concern data, verifier and loss.

    `llm2 train --help` describes each. Those of the verifier are read where the trainer gets a name, not a verifier.
    """

    chat_template: str | None = None
    max_length: int = 2048
    kind: Kind = "full"
    prefix_head_size: int = 8
    token_weight: bool = False
    init_from: str | None = None
    trainable_layers: int | None = None
    lora_r: int | None = None
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_target_modules: str | list[str] | tuple[str, ...] = "all-linear"
    dropout: float = 0.0
    attn_implementation: str = "auto"
    guided_beta: float | None = None
    quality_weight: bool = False
    label_smoothing: float = 0.0
    margin: float = 0.0
    lm_loss_coef: float = 0.0
    # What a Trainer of verifiers needs of transformers' own.
    label_names: list[str] | None = field(default_factory=lambda: ["pair_ids"])
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False  # it would hide what VerifierTrainer.log refuses
    ddp_broadcast_buffers: bool | None = False  # every process loads the same unembedding, and it is large

    def __post_init__(self) -> None:
        """Raises UserError for a value that the command refuses too."""
        super().__post_init__()
        if self.label_smoothing_factor:  # the Trainer's own, which no loss here reads
            raise UserError(f"label_smoothing_factor: found {self.label_smoothing_factor}, expected label_smoothing")
        if isinstance(self.lora_target_modules, list):
            self.lora_target_modules = tuple(self.lora_target_modules)
        try:
            TrainConfig(model="", train_file="", output_dir="", **{name: getattr(self, name) for name in OWN})
        except ValidationError as error:
            raise UserError(first_misfit(error)) from None


OWN = tuple(
    name for name in vars(VerifierTrainingArguments)["__annotations__"] if name in TrainConfig.__dataclass_fields__
)


def refuse_options(model: str, config: TrainConfig | VerifierTrainingArguments) -> None:
    """Raise UserError for keys that System 1 excludes, before anything slow."""
    if is_local(model) and Path(model_path(model)).resolve() == Path(config.output_dir).resolve():
        raise UserError(f"output_dir: found {config.output_dir!r}, the folder of System 1; expected another one")
    if config.lm_loss_coef > 0 and (key := changes_logits(load_config(model))) is not None:
        raise UserError(f"lm_loss_coef: {model} has {key}, which changes the loss; expected 0")
    if config.init_from is not None:
        name = config.init_from
        if differing := difference(as_dict(verifier_config(name).spec), verifier_spec(config), ()):
            raise UserError(f"init_from: expected a verifier as it is to be trained: in {name}, {differing}")
        require_same_tokenizer(f"init_from: verifier {name!r}", name, model)
        require_same_template(name, model, config.chat_template)


def refuse_steps(
    config: TrainConfig | VerifierTrainingArguments, train_set: Sequence[Example], eval_set: Sequence[Example]
) -> None:
    """Raise UserError for keys that labelled steps exclude, and for held-out data of the other format."""
    of_steps = train_set[0].of_steps
    if eval_set and eval_set[0].of_steps != of_steps:
        raise UserError(
            f"found {FORMATS[of_steps]} to train on and {FORMATS[not of_steps]} held out; expected one format"
        )
    for key in ("guided_beta", "margin", "best_by", "metric_for_best_model") if of_steps else ():
        value = getattr(config, key, None) or ""
        if not isinstance(value, str) or "choice" in value or "guided" in value:
            raise UserError(f"{key}: found {quote(value)}, which is of pairs of tokens; the data are labelled steps")


def verifier_spec(config: TrainConfig | VerifierTrainingArguments) -> VerifierSpec:
    return VerifierSpec(**{name: getattr(config, name) for name in VerifierSpec.__dataclass_fields__})


def new_verifier(model: str, config: VerifierTrainingArguments, device: torch.device) -> ProcessVerifier:
    """What it trains is in float32, whatever System 1 is stored in: 16 bits would lose small updates. With `bf16` the
    frozen weights of a head or an adapter are in bfloat16, as decoding has them, which takes half the memory."""
    attention = config.attn_implementation
    if attention == "auto":
        attention = "flex_attention" if device.type == "cuda" else None  # SDPA, or eager where a family has none
    if attention == "flex_attention" and device.type != "cuda":
        raise UserError(
            "attn_implementation flex_attention: expected a CUDA GPU, since torch trains it nowhere else; use sdpa"
        )
    spec = verifier_spec(config)
    dtype = torch.bfloat16 if config.bf16 and not spec.is_whole else torch.float32
    if config.init_from is None:
        verifier = ProcessVerifier.from_system1(model, spec, dtype=dtype, attn_implementation=attention)
    else:
        start, vocabulary = config.init_from, vocabulary_size(model)
        where, options = torch.device("cpu"), {"dtype": dtype, "attn_implementation": attention}
        system1 = None  # a head or an adapter goes on with the weights that it is of, and is refused for others
        if not spec.is_whole:
            system1 = load_language_model(model, local_files_only=is_local(model), **options)
        verifier = load_verifier(start, where, dtype, vocabulary, system1, attn_implementation=attention)
        verifier.config.base_model = without_home(model)
    for parameter in verifier.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    verifier.config.dtype = torch.float32
    if config.trainable_layers is not None:
        freeze_layers(verifier, config.trainable_layers)
    if verifier.config.is_adapter:
        refuse_unknown_targets(verifier)
    return verifier


def freeze_layers(verifier: ProcessVerifier, trainable: int) -> None:
    """Leave only the head and the `trainable` highest layers to be trained."""
    backbone, count = verifier.backbone, verifier.backbone.config.get_text_config().num_hidden_layers
    if trainable > count:
        raise UserError(f"trainable_layers: found {trainable}, expected at most the {count} of {backbone.name_or_path}")
    layers = next(m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    backbone.requires_grad_(False)
    layers[count - trainable :].requires_grad_(True)
    if not any(parameter.requires_grad for parameter in verifier.parameters()):
        raise UserError("trainable_layers: found 0, expected at least 1: scores are read by the frozen embedding alone")


def refuse_unknown_targets(verifier: ProcessVerifier) -> None:
    """Raise UserError for a target that is the name of no layer: peft looks whether any of them is one."""
    targets = verifier.config.lora["targets"]
    names = [f".{name}" for name, _ in verifier.backbone.named_modules()]
    for target in targets if isinstance(targets, list) else ():
        if not any(name.endswith(f".{target}") for name in names):
            raise UserError(f"lora_target_modules: found {quote(target)}, which is the name of no layer of the model")


def refuse_long_solutions(backbone: PreTrainedModel, length: int) -> None:
    """Raise UserError if the backbone has too few positions for `length` tokens, or a shorter window: with branch masks
    a token sees its whole prefix, so its scores would not be those of the backbone's own attention."""
    window = examine(type(backbone), backbone.config).window
    if window is not None and length > window:
        raise UserError(
            f"the backbone attends to a sliding window of {window} tokens, shorter than the {length} of prompt "
            f"and solution; keep them within {window} tokens"
        )
    refuse_too_long(backbone.config, length, "the longest solution")


def refuse_unknown_tokens(verifier: ProcessVerifier, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if the tokenizer has added tokens that System 1 does not embed."""
    rows = verifier.backbone.config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} has {len(tokenizer)} tokens and the model embeds {rows}; "
            "expected a model whose embeddings were resized"
        )
