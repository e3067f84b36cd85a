"""ProcessVerifier, System 2: a decoder-only backbone and a scalar head that scores each token in its context.

Knows how it is made from System 1, called, saved and loaded. Which tokens to score, and in what mask, is the business
of `branches`; what the scores are for, of `generation` and `training`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from llm2.common.loading import is_local, load_backbone, resolve_dtype
from llm2.errors import UserError
from llm2.verifier import lora
from llm2.verifier.branches import mask_for
from llm2.verifier.checkpoints import is_sharded, sharded_state
from llm2.verifier.loss import IGNORE_INDEX, chunked_cross_entropy
from llm2.verifier.packing import row_block_mask, row_mask


class ProcessVerifierConfig(PreTrainedConfig):
    """Holds the backbone's own config whole.

    lora: rank, alpha, dropout and targets of the adapter; None for a verifier with weights of its own.
    base_model: folder or hub id of the System 1 that the verifier was made from.
    """

    model_type = "llm2_process_verifier"
    sub_configs = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone_config: PreTrainedConfig | dict | None = None,
        lora: dict[str, Any] | None = None,
        base_model: str | None = None,
        **kwargs,
    ) -> None:
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        self.backbone_config = backbone_config
        self.lora, self.base_model = lora, base_model
        super().__init__(**kwargs)


@dataclass
class VerifierOutput(ModelOutput):
    """scores (R, S): one a column of the input. margins (1, M): score of gold less score of negative, a pair each.
    lm_loss (1,): sum of -log p over the tokens to foretell."""

    scores: torch.Tensor | None = None
    margins: torch.Tensor | None = None
    lm_loss: torch.Tensor | None = None
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

    def __init__(self, config: ProcessVerifierConfig, backbone: PreTrainedModel | None = None) -> None:
        """Without a backbone one of random weights is made."""
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config) if backbone is None else backbone
        self.score = nn.Linear(config.backbone_config.get_text_config().hidden_size, 1, bias=False)
        self.set_unembedding(None)
        self.post_init()

    @classmethod
    def from_system1(cls, model: str, lora: Mapping[str, Any] | None = None, **options) -> "ProcessVerifier":
        """A new verifier whose backbone is System 1's, its head drawn from N(0, initializer_range).

        Args:
            model: local folder or hub id of a decoder-only language model.
            lora: settings of an adapter (`lora.DEFAULTS`); System 1's weights are then frozen. None for a full copy.
            options: passed to AutoModel.from_pretrained (dtype, local_files_only, attn_implementation, ...).
        """
        verifier = cls.from_backbone(load_backbone(model, **options), model, lora)
        nn.init.normal_(verifier.score.weight, std=verifier.backbone.config.get_text_config().initializer_range)
        return verifier

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *inputs, system1: PreTrainedModel | None = None, **options
    ) -> "ProcessVerifier":
        """A saved verifier, full or LoRA.

        Args:
            name: local folder, of a checkpoint in DeepSpeed's shards too, or hub id.
            system1: the loaded model that a LoRA verifier was made from; their weights are then the same Parameters,
                and frozen. Without it the base weights are loaded from the `base_model` of the verifier's config.
            options: as for any transformers model.
        """
        found = {key: options[key] for key in ("local_files_only", "revision", "token") if key in options}
        config = ProcessVerifierConfig.from_pretrained(name, **found)
        sharded = is_sharded(Path(name))
        if config.lora is None and sharded:
            verifier = cls(config)
            verifier.load_state_dict(sharded_state(Path(name)))
            dtype = options.get("dtype")  # the shards' is float32
            return verifier.eval().to(dtype if isinstance(dtype, torch.dtype) else torch.float32)
        if config.lora is None:
            return super().from_pretrained(name, *inputs, **options)
        if system1 is None:
            backbone = load_backbone(config.base_model, **{**options, "local_files_only": is_local(config.base_model)})
        else:
            backbone = lora.clone_sharing_weights(system1.base_model)
        verifier = cls.from_backbone(backbone, config.base_model, config.lora)
        if sharded:
            lora.set_adapter(verifier, lora.adapter_state(sharded_state(Path(name))), str(name))
        else:
            lora.load_adapter(str(name), verifier, **found)
        return verifier.eval()

    @classmethod
    def from_backbone(
        cls, backbone: PreTrainedModel, base: str, settings: Mapping[str, Any] | None
    ) -> "ProcessVerifier":
        """A verifier on this very backbone; its head is not drawn yet."""
        own = backbone.config
        config = ProcessVerifierConfig(
            own, base_model=base, dtype=backbone.dtype, attn_implementation=own._attn_implementation
        )
        with torch.device("meta"):  # transformers initialises no weights then: the backbone's are not to be touched
            verifier = cls(config, backbone)
        verifier.score = nn.Linear(verifier.score.in_features, 1, bias=False, dtype=backbone.dtype)
        verifier.score.to(backbone.device)
        if settings is not None:
            config.lora = lora.complete(settings)
            lora.inject(backbone, config.lora)
        return verifier

    def save_pretrained(
        self,
        folder: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        **options,
    ) -> None:
        """As for any transformers model; of a LoRA verifier only the adapter, the head and the config are written."""
        if self.config.lora is None:
            super().save_pretrained(folder, is_main_process=is_main_process, state_dict=state_dict, **options)
        elif is_main_process:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.config.architectures = [type(self).__name__]
            self.config.save_pretrained(folder)
            state = self.state_dict() if state_dict is None else state_dict
            lora.save_adapter(Path(folder), state, self.config.lora, self.config.base_model)

    def merge(self) -> "ProcessVerifier":
        """Fold a LoRA adapter into weights of the verifier's own; System 1's are not touched. Returns itself."""
        if self.config.lora is not None:
            lora.merge(self.backbone)
            self.config.lora = None
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def resize_token_embeddings(self, *arguments, **options) -> nn.Module:
        """The backbone's own; its config, which the verifier's holds, knows the new size."""
        embeddings = self.backbone.resize_token_embeddings(*arguments, **options)
        self.config.backbone_config = self.backbone.config
        return embeddings

    def set_unembedding(self, weight: torch.Tensor | None) -> None:
        """What foretells tokens for the auxiliary language-model loss; never trained nor saved.

        Args:
            weight: (V, D) System 1's output embedding; None where it is tied to the input embedding, which then serves.
        """
        self.register_buffer("unembedding", weight, persistent=False)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        start: torch.Tensor | None = None,
        bound: torch.Tensor | None = None,
        pairs: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
    ) -> VerifierOutput:
        """Score every column.

        Args:
            input_ids: (R, S).
            attention_mask: (R, S + cached), or (R, 1, S, S + cached) booleans as `branches.sees` makes them.
            position_ids: (R, S).
            start, bound: (R, S) of packed rows (see `packing`), in place of attention_mask and position_ids.
            pairs: (1, M, 2) the places of gold and negative in the flattened columns; with it `margins` are returned.
            targets: (R, S) the token to foretell in each column, or IGNORE_INDEX; with it `lm_loss` is returned.
        """
        if bound is not None:
            attention_mask, position_ids = self._packed_mask(start, bound), bound - start
        hidden = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        ).last_hidden_state
        scores = self.score(hidden).squeeze(-1)  # (R, S)
        output = VerifierOutput(scores=scores, past_key_values=past_key_values)
        if pairs is not None:
            gold, negative = scores.flatten()[pairs].unbind(-1)  # (1, M)
            output.margins = gold - negative
        if targets is not None:
            weight = self.get_input_embeddings().weight if self.unembedding is None else self.unembedding
            foretelling = targets != IGNORE_INDEX
            states = hidden[foretelling]
            output.lm_loss = chunked_cross_entropy(states, weight.to(states.dtype), targets[foretelling])[None]
        return output

    def _packed_mask(self, start: torch.Tensor, bound: torch.Tensor) -> torch.Tensor | BlockMask:
        if self.backbone.config._attn_implementation == "flex_attention":
            return row_block_mask(start, bound)
        return mask_for(self.backbone, row_mask(start, bound))


AutoConfig.register(ProcessVerifierConfig.model_type, ProcessVerifierConfig)
AutoModel.register(ProcessVerifierConfig, ProcessVerifier)


def require_verifier(name: str) -> None:
    """Say at once, before anything heavy, that a local verifier is not there."""
    if is_local(name) and not (Path(name) / "config.json").is_file():
        raise UserError(
            f"verifier {name!r}: expected a folder with config.json, found none; "
            "`bash scripts/train_verifier.sh` trains one"
        )


def load_verifier(
    name: str, device: torch.device, dtype: str, vocabulary: int, system1: PreTrainedModel | None = None
) -> ProcessVerifier:
    """A trained verifier in evaluation mode; it must know the tokens of the System 1 it is to guide.

    Args:
        system1: with it a LoRA verifier stands on System 1's own weights, and `device` and `dtype` are System 1's.
    """
    require_verifier(name)
    options = {"local_files_only": is_local(name), "dtype": resolve_dtype(dtype, device)}
    try:
        verifier = ProcessVerifier.from_pretrained(name, system1=system1, **options)
    except UserError as error:
        raise UserError(f"verifier {name!r}: {error}") from None
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
