"""ProcessVerifier, System 2: a decoder-only backbone and a scalar head that scores each token in its context.

Knows how it is made from System 1, called, saved and loaded. Which tokens to score, and in what mask, is the business
of `branches`; what the scores are for, of `generation` and `training`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from llm2.errors import UserError
from llm2.models import is_local, pick_dtype


class ProcessVerifierConfig(PreTrainedConfig):
    """Holds the backbone's own config whole."""

    model_type = "llm2_process_verifier"
    sub_configs = {"backbone_config": AutoConfig}

    def __init__(self, backbone_config: PreTrainedConfig | dict | None = None, **kwargs) -> None:
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        self.backbone_config = backbone_config
        super().__init__(**kwargs)


@dataclass
class VerifierOutput(ModelOutput):
    """scores (B, S): one a column of the input. margins (B, M): score of gold less score of negative, a pair each."""

    scores: torch.Tensor | None = None
    margins: torch.Tensor | None = None
    past_key_values: Cache | None = None


class ProcessVerifier(PreTrainedModel):
    """s(x_<t, v): the score of a token given what stands before it (arXiv 2412.20372).

    The score of the token in a column is read off the backbone's last hidden state in that column by a linear head
    without bias. The vocabulary-sized head of a language model is never run.
    """

    config_class = ProcessVerifierConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ProcessVerifierConfig) -> None:
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config)
        self.score = nn.Linear(config.backbone_config.get_text_config().hidden_size, 1, bias=False)
        self.post_init()

    @classmethod
    def from_system1(cls, model: str, **options) -> "ProcessVerifier":
        """A new verifier whose backbone is System 1's, its head drawn from N(0, initializer_range).

        Args:
            model: local folder or hub id of a decoder-only language model.
            options: passed to AutoModel.from_pretrained (dtype, local_files_only, attn_implementation, ...).
        """
        backbone = AutoModel.from_pretrained(model, **options)
        with torch.device("meta"):  # the frame alone: its weights would only be thrown away
            verifier = cls(ProcessVerifierConfig(backbone.config, dtype=backbone.dtype))
        verifier.backbone = backbone
        verifier.score = nn.Linear(verifier.score.in_features, 1, bias=False, dtype=backbone.dtype)
        nn.init.normal_(verifier.score.weight, std=backbone.config.get_text_config().initializer_range)
        return verifier

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        pairs: torch.Tensor | None = None,
    ) -> VerifierOutput:
        """Score every column.

        Args:
            input_ids: (B, S).
            attention_mask: (B, S + cached), or (B, 1, S, S + cached) booleans as `branches.branch` makes them.
            position_ids: (B, S).
            pairs: (B, M, 2) the columns of gold and negative; with it `margins` are returned.
        """
        output = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        scores = self.score(output.last_hidden_state).squeeze(-1)  # (B, S)
        if pairs is None:
            return VerifierOutput(scores=scores, past_key_values=past_key_values)
        gold, negative = scores.gather(-1, pairs[..., 0]), scores.gather(-1, pairs[..., 1])  # (B, M)
        return VerifierOutput(scores=scores, margins=gold - negative)


AutoConfig.register(ProcessVerifierConfig.model_type, ProcessVerifierConfig)
AutoModel.register(ProcessVerifierConfig, ProcessVerifier)


def load_verifier(name: str, device: torch.device, dtype: str, vocabulary: int) -> ProcessVerifier:
    """A trained verifier in evaluation mode; it must know the tokens of the System 1 it is to guide."""
    options = {"local_files_only": is_local(name), "dtype": pick_dtype(dtype, device)}
    if is_local(name) and not (Path(name) / "config.json").is_file():
        raise UserError(f"verifier {name!r}: expected a folder with config.json, found none; train one first")
    try:
        verifier = ProcessVerifier.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"verifier {name!r} could not be loaded: {str(error).strip().splitlines()[0]}") from None
    own = verifier.get_input_embeddings().num_embeddings
    if own < vocabulary:
        raise UserError(f"verifier {name!r} knows {own} tokens and System 1 {vocabulary}: not made from this System 1")
    return verifier.to(device).eval()


def refuse_sliding_window(config: PreTrainedConfig, length: int) -> None:
    """Branch masks let a token see its whole prefix; a backbone with a shorter window would see something else."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    if window is not None and length > window:
        raise UserError(
            f"the backbone attends to a sliding window of {window} tokens and {length} are asked for; "
            f"keep prompts and solutions within {window} tokens"
        )
