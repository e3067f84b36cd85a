"""ProcessVerifier, System 2: a decoder-only backbone and a head that scores each token in its context."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_NAME, ModelOutput

from llm2.common.home import with_home, without_home
from llm2.common.kinds import KINDS, OfKind, kind_of
from llm2.common.loading import HUB, is_local, load_backbone, load_language_model, load_whole, resolve_dtype
from llm2.config import VerifierSpec
from llm2.errors import UserError
from llm2.verifier import lora
from llm2.verifier.checkpoints import is_sharded, sharded_state
from llm2.verifier.heads import PrefixHead, TokenWeight, fingerprint, output_fingerprint, stored_fingerprint
from llm2.verifier.loss import IGNORE_INDEX, chunked_cross_entropy
from llm2.verifier.masks import as_attention_mask, packed_block_mask, packed_mask

FLEX = "flex_attention"  # transformers' FlexAttention
LLM2_FLEX = "llm2_flex_attention"  # ours, which every verifier has in its place
FULL = VerifierSpec()
ADAPTER = {"rank": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "lora_target_modules"}


class ProcessVerifierConfig(OfKind, PreTrainedConfig):
    """Contains the backbone's config.

    Args:
        score, prefix_head, lora: the parts of a kind (`common/kinds.py`): `candidate` (the paper's) or `prefix`; kind,
            size and perhaps `token_weight` of a head (`heads.PrefixHead`); rank, alpha, dropout, targets of an adapter.
        base_model: folder or hub id of the System 1 that the verifier was made from.
        token_weight: whether scores of all layers have a learnt factor for each prefix (`heads.TokenWeight`).
        system1_fingerprint: of the weights that a prefix head or an adapter was trained on (`heads.fingerprint`).
        output_fingerprint: of System 1's output embedding, by which `prefix_lora` scores where it is not tied.
        beta: weight of the score that was best on held-out forks; None if training did not choose one.
    """

    model_type = "llm2_process_verifier"
    sub_configs = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference = ["scores", "lm_loss"]  # the Trainer gathers the margins alone

    def __init__(
        self,
        backbone_config: PreTrainedConfig | dict | None = None,
        lora: dict[str, Any] | None = None,
        base_model: str | None = None,
        score: str = "candidate",
        prefix_head: dict[str, Any] | None = None,
        system1_fingerprint: str | None = None,
        beta: float | None = None,
        token_weight: bool = False,
        output_fingerprint: str | None = None,
        **kwargs,
    ) -> None:
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        self.backbone_config = backbone_config
        self.lora, self.base_model = lora, base_model
        self.score = "prefix" if prefix_head else score  # the first folders of prefix heads have no `score`
        self.prefix_head, self.system1_fingerprint, self.beta = prefix_head, system1_fingerprint, beta
        self.token_weight, self.output_fingerprint = token_weight, output_fingerprint
        super().__init__(**kwargs)

    @classmethod
    def of(cls, spec: VerifierSpec, backbone: PreTrainedConfig, **options) -> "ProcessVerifierConfig":
        score, head, adapter = KINDS[spec.kind]
        settings = {name: getattr(spec, key) for name, key in ADAPTER.items()}
        lora = {name: list(x) if isinstance(x, tuple) else x for name, x in settings.items()} if adapter else None
        weight = {"token_weight": True} if spec.token_weight else {}
        prefix_head = head and {"kind": head, "size": spec.prefix_head_size, **weight}
        options |= {"lora": lora, "score": score, "prefix_head": prefix_head}
        return cls(backbone, token_weight=spec.token_weight and head is None, **options)

    @property
    def kind(self) -> str:
        return kind_of(self.score, self.prefix_head and self.prefix_head["kind"], self.lora is not None)

    @property
    def spec(self) -> VerifierSpec:
        """The inverse of `of`, for files of every version."""
        head, lora = self.prefix_head or {}, self.lora or {}
        settings = {ADAPTER[name]: tuple(x) if isinstance(x, list) else x for name, x in lora.items()}
        settings |= {"prefix_head_size": head["size"]} if head else {}
        weighted = self.token_weight or head.get("token_weight", False)
        return VerifierSpec(kind=self.kind, token_weight=weighted, **settings)

    def to_dict(self) -> dict[str, Any]:
        """Omit local paths: `base_model` has the name that the user gave."""
        values = super().to_dict()
        if isinstance(values.get("backbone_config"), dict):
            values["backbone_config"].pop("_name_or_path", None)
        return values


@dataclass
class VerifierOutput(ModelOutput):
    """Letters: R rows, S columns, M pairs.

    scores (R, S): of every input token. margins (1, M): score of gold less score of negative, for every pair.
    lm_loss (1,): sum of -log p over the target tokens.
    """

    scores: torch.Tensor | None = None
    margins: torch.Tensor | None = None
    lm_loss: torch.Tensor | None = None


class ProcessVerifier(PreTrainedModel):
    """s(x_<t, v): the score of token v after the prefix x_<t (arXiv 2412.20372).

    With `config.score` candidate, a linear head without bias maps the backbone's last hidden state at a token to the
    token's score. With prefix, the score depends on the state h at the token before it:

        all layers       s = o_v . h with an output embedding o that starts as System 1's and is trained; where System 1
                         ties it to the input embedding, it stays tied (the form of GenARM, arXiv 2410.08193)
        a prefix head    s = head(h, e_v) on the states of System 1 itself, which stays as it is

    Either may have a factor w(h) >= 0, a learnt weight for each prefix (`token_weight`; the idea of TARo, arXiv
    2603.18411).

    Only differences of scores after the same prefix have a meaning. System 1's vocabulary-sized head is never run.
    """

    config_class = ProcessVerifierConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ProcessVerifierConfig, backbone: PreTrainedModel | None = None) -> None:
        """Without a backbone, one with random weights is created."""
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config) if backbone is None else backbone
        if self.backbone.config._attn_implementation == FLEX:
            self.backbone.set_attn_implementation(LLM2_FLEX)
        text = config.backbone_config.get_text_config()
        if config.reads_candidates:
            self.score = nn.Linear(text.hidden_size, 1, bias=False)
        elif config.is_head:
            self.score = PrefixHead(config.prefix_head, self.get_input_embeddings())
        else:  # the output embedding; None where it is the input embedding
            self.score = None if text.tie_word_embeddings else nn.Embedding(text.vocab_size, text.hidden_size)
        self.token_weight = TokenWeight(text.hidden_size) if config.token_weight else None
        self.dropout = nn.Dropout(0.0)  # on the states that scores are read from; training sets its probability
        self.set_unembedding(None)
        self.post_init()

    @classmethod
    def from_system1(cls, model: str, spec: VerifierSpec = FULL, **options) -> "ProcessVerifier":
        """A new verifier: System 1's backbone, and a head: drawn from N(0, initializer_range), or System 1's own.

        Args:
            model: local folder or hub id of a decoder-only language model, or `testbed`.
            options: passed to from_pretrained (dtype, local_files_only, attn_implementation, ...).
        """
        if not (spec.reads_candidates or spec.is_head):
            return cls.from_language_model(load_language_model(model, **options), model, spec)
        verifier = cls.from_backbone(load_backbone(model, **options), model, spec)
        if spec.reads_candidates:
            nn.init.normal_(verifier.score.weight, std=verifier.backbone.config.get_text_config().initializer_range)
        return verifier

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *inputs, system1: PreTrainedModel | None = None, **options
    ) -> "ProcessVerifier":
        """Load a full verifier, a LoRA verifier or a prefix head.

        Args:
            name: local folder or hub id; a folder may hold the weights in DeepSpeed's shards alone.
            system1: the loaded System 1 of a LoRA verifier or a prefix head, whose backbone then shares its Parameters.
                Without it the base weights are loaded from the config's `base_model`.
            options: as for any transformers model.
        """
        offline = options.pop("local_files_only", False)
        where = {key: options[key] for key in HUB if key in options}
        where["local_files_only"] = offline or is_local(str(name))
        config = ProcessVerifierConfig.from_pretrained(name, **where)
        sharded = is_sharded(Path(name))
        if config.is_whole and sharded:
            verifier = cls(config)
            verifier.load_state_dict(sharded_state(Path(name)))
            dtype = options.get("dtype", "float32")  # as the shards hold; `auto` is the same
            return verifier.eval().to(resolve_dtype(dtype, torch.device("cpu")))
        if config.is_whole:
            load = partial(super().from_pretrained, name, *inputs)
            return load_whole(load, "its weights", **{**options, **where})
        if system1 is None:
            base_model = with_home(config.base_model)
            options = {key: value for key, value in options.items() if key not in ("revision", "subfolder")}
            system1 = load_language_model(base_model, local_files_only=offline, **options)
        else:
            system1 = lora.clone_sharing_weights(system1)
        verifier = cls.from_language_model(system1, config.base_model, config.spec)
        found, expected = verifier.config.system1_fingerprint, config.system1_fingerprint
        if found != expected and system1.dtype == torch.float16:  # its rounding is not bfloat16's
            found = stored_fingerprint(system1.name_or_path, f"{system1.base_model_prefix}.")
        output = None if system1.dtype == torch.float16 else config.output_fingerprint
        of_other = found != expected and (config.is_head or expected is not None)  # earlier adapters name none
        if of_other or output not in (None, verifier.config.output_fingerprint):
            raise UserError(
                f"it was trained on the states of {config.base_model}, found another System 1; it is of no use to any "
                "other model"
            )
        verifier.config.beta, verifier.config.system1_fingerprint = config.beta, found
        verifier.config.output_fingerprint = config.output_fingerprint
        if sharded and config.is_adapter:
            lora.set_adapter(verifier, lora.adapter_state(verifier, sharded_state(Path(name))), str(name))
        else:
            verifier.load_trained(str(name), **where)
        return verifier.eval()

    @classmethod
    def from_language_model(
        cls, system1: PreTrainedModel, base_model: str, spec: VerifierSpec = FULL
    ) -> "ProcessVerifier":
        """A verifier on the weights of this language model, not a copy, its output embedding included."""
        verifier = cls.from_backbone(system1.base_model, base_model, spec)
        if isinstance(verifier.score, nn.Embedding):
            verifier.score.weight = system1.get_output_embeddings().weight
            verifier.score.requires_grad_(not spec.is_adapter)
            verifier.config.output_fingerprint = output_fingerprint(system1) if spec.is_adapter else None
        return verifier

    @classmethod
    def from_backbone(cls, backbone: PreTrainedModel, base_model: str, spec: VerifierSpec = FULL) -> "ProcessVerifier":
        """A verifier on this backbone itself, not a copy. Its head is not initialised."""
        config = ProcessVerifierConfig.of(
            spec,
            backbone.config,
            base_model=without_home(base_model),
            dtype=backbone.dtype,
            attn_implementation=backbone.config._attn_implementation,
            system1_fingerprint=None if spec.is_whole else fingerprint(backbone),
        )
        with torch.device("meta"):  # keeps transformers from initialising the backbone's weights anew
            verifier = cls(config, backbone)
        if config.token_weight:
            verifier.token_weight = TokenWeight(verifier.token_weight.in_features).to(backbone.device)
        if config.is_head:
            backbone.requires_grad_(False)
            verifier.score = PrefixHead(config.prefix_head, backbone.get_input_embeddings()).to(backbone.device)
            return verifier
        if config.reads_candidates:
            verifier.score = nn.Linear(verifier.score.in_features, 1, bias=False, dtype=backbone.dtype)
            verifier.score.to(backbone.device)
        if config.is_adapter:
            lora.inject(backbone, config.lora)
        return verifier

    def save_pretrained(
        self,
        folder: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        **options,
    ) -> None:
        """As for any transformers model; of a LoRA verifier or a prefix head without the base weights."""
        if self.config.is_whole:
            super().save_pretrained(folder, is_main_process=is_main_process, state_dict=state_dict, **options)
        elif is_main_process:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.config.architectures = [type(self).__name__]
            self.config.save_pretrained(folder)
            state = self.state_dict() if state_dict is None else state_dict
            if self.config.is_head:
                head = {key: tensor.contiguous().cpu() for key, tensor in state.items() if key.startswith("score.")}
                save_file(head, Path(folder, SAFE_WEIGHTS_NAME), metadata={"format": "pt"})
                return
            adapter = lora.adapter_state(self, state)
            lora.save_adapter(Path(folder), adapter, self.config.lora, self.config.base_model)

    @property
    def uses_flex_attention(self) -> bool:
        return self.backbone.config._attn_implementation == LLM2_FLEX

    def load_trained(self, name: str, **options) -> None:
        """Read the adapter or the prefix head of a folder or hub id."""
        if self.config.is_adapter:
            lora.load_adapter(name, self, **options)
        else:
            self.score.load_weights(name, **options)

    def merge(self) -> "ProcessVerifier":
        """Fold a LoRA adapter into new weights, which makes this a full verifier; System 1's weights do not change."""
        if self.config.is_adapter:
            lora.merge(self.backbone)
            self.config.lora = None
        return self

    def resize_token_embeddings(self, *arguments, **options) -> nn.Module:
        embeddings = self.backbone.resize_token_embeddings(*arguments, **options)
        self.config.backbone_config = self.backbone.config
        return embeddings

    def set_unembedding(self, weight: torch.Tensor | None) -> None:
        """System 1's output embedding (V, D) for the auxiliary language-model loss; neither trained nor saved.

        None stands for the backbone's input embedding, to which it is tied.
        """
        self.register_buffer("unembedding", weight, persistent=False)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
        prefix_len: torch.Tensor | None = None,
        pair_indices: torch.Tensor | None = None,
        pair_tokens: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        states: torch.Tensor | None = None,
        **backbone_options: Any,
    ) -> VerifierOutput:
        """Score every token, or the two tokens of each pair.

        Args:
            input_ids: (R, S).
            attention_mask: (R, S + cached), or (R, 1, S, S + cached) booleans as from `masks.tree_mask`.
            position_ids: (R, S).
            start, prefix_len: (R, S) of packed rows (see `masks`), in place of attention_mask and position_ids.
            pair_indices: (1, M, 2) or, where `score` is prefix, (1, M), as in VerifierBatch; asks for `margins`.
            pair_tokens: (1, M, 2), where `score` is prefix or a token is absent (below 0), whose score is 0.
            targets: (R, S) the next token, or IGNORE_INDEX; asks for `lm_loss`.
            states: (N, D) of a prefix head's System 1, in place of input_ids; pair_indices count its rows.
            backbone_options: passed to the backbone where attention_mask is, such as a cache, which it fills.
        """
        if states is not None:
            hidden = states
        elif prefix_len is not None:
            hidden = self.states(input_ids, start, prefix_len)
        else:
            hidden = self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{"use_cache": False, **backbone_options},
            ).last_hidden_state
        output = VerifierOutput()
        if self.config.reads_candidates:
            output.scores = self.score(self.dropout(hidden).to(self.score.weight.dtype)).squeeze(-1)  # (R, S)
            pair_scores = None if pair_indices is None else output.scores.flatten()[pair_indices]  # (1, M, 2)
        elif pair_indices is not None:
            states = self.dropout(hidden.flatten(end_dim=-2)[pair_indices])  # (1, M, D)
            pair_scores = self.prefix_scores(states, pair_tokens.clamp(min=0))
        else:
            before = nn.functional.pad(
                hidden, (0, 0, 1, -1)
            )  # the first token has no prefix, so its score means nothing
            output.scores = self.prefix_scores(before, input_ids[..., None]).squeeze(-1)
        if pair_indices is not None:
            if pair_tokens is not None:
                pair_scores = pair_scores.masked_fill(pair_tokens < 0, 0.0)
            output.margins = pair_scores[..., 0] - pair_scores[..., 1]
        if targets is not None:
            weight = self.get_input_embeddings().weight if self.unembedding is None else self.unembedding
            has_target = targets != IGNORE_INDEX
            target_states = hidden[has_target]
            output.lm_loss = chunked_cross_entropy(target_states, weight.to(target_states.dtype), targets[has_target])[
                None
            ]
        return output

    def prefix_scores(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Scores of tokens (..., K) after prefixes whose last tokens have these states (..., D) -> (..., K) float32.

        Only where `score` is prefix.
        """
        states = states[..., None, :]
        if self.config.is_head:
            return self.score(states, self.get_input_embeddings()(tokens))
        output_embedding = self.get_input_embeddings() if self.score is None else self.score
        rows = nn.functional.embedding(tokens, output_embedding.weight)  # not its forward: some models scale that
        scores = (states.float() * rows.float()).sum(-1)
        return scores if self.token_weight is None else scores * self.token_weight(states)

    def states(self, input_ids: torch.Tensor, start: torch.Tensor, prefix_len: torch.Tensor) -> torch.Tensor:
        """The backbone's last hidden states (R, S, D) of packed rows."""
        if self.uses_flex_attention:
            mask = packed_block_mask(start, prefix_len)
        else:
            mask = as_attention_mask(self.backbone, packed_mask(start, prefix_len))
        return self.backbone(
            input_ids=input_ids, attention_mask=mask, position_ids=prefix_len, use_cache=False
        ).last_hidden_state


def flex_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *mask, **options
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' FlexAttention, in the dtype of the values: under autocast rotary embeddings return queries and keys
    in float32, and not every torch takes them beside values in 16 bits."""
    attend = AttentionInterface()[FLEX]
    return attend(module, query.to(value.dtype), key.to(value.dtype), value, *mask, **options)


AttentionInterface.register(LLM2_FLEX, flex_attention)
AttentionMaskInterface.register(LLM2_FLEX, AttentionMaskInterface()[FLEX])
AutoConfig.register(ProcessVerifierConfig.model_type, ProcessVerifierConfig)
AutoModel.register(ProcessVerifierConfig, ProcessVerifier)
