"""What a backbone requires of attention and cache, found by a dry run without weights.

Decoding caches keys and values only, replaces the attention function, and puts tokens of many sequences into one row. A
model that caches more, attends twice per layer, or builds its own masks would silently decode wrong text. So the model
runs once on the `meta` device, with an attention function that inspects its arguments.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from transformers import (
    MODEL_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from llm2.errors import UserError, reason

logger = logging.getLogger("llm2")

PROBE = "llm2_dry_run"
ATTENTION_OPTIONS = ("scaling", "sliding_window", "softcap", "s_aux")  # those of decoding.attention.attend
PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)  # cache layers that ours replaces
FAR = 2**17  # position of the query whose mask is checked; longer windows are not verified


@dataclass(eq=False)
class DryRun:
    """What the attention layers of a model were called with."""

    calls: Counter[int] = field(default_factory=Counter)  # by layer
    values_per_token: Counter[int] = field(default_factory=Counter)  # cached numbers per token, by layer
    windows: set[int] = field(default_factory=set)
    objections: list[str] = field(default_factory=list)

    def see(self, layer: int, key: torch.Tensor, value: torch.Tensor, mask: Any, options: dict[str, Any]) -> None:
        """One call of the attention function; key and value are (1, heads, tokens, width)."""
        self.calls[layer] += 1
        self.values_per_token[layer] += 2 * key.shape[1] * max(key.shape[3], value.shape[3])
        window, where = options.get("sliding_window"), f"in layer {layer}"
        self.windows |= {window} - {None}
        for name, option in options.items():
            ours = name in ATTENTION_OPTIONS or name in RUN_OPTIONS
            if not ours and (isinstance(option, torch.Tensor) or option) and name != "is_causal":
                self.objections.append(f"gives its attention {name!r} {where}, which ours does not take")
        if options.get("is_causal") is False:
            self.objections.append(f"does not attend causally {where}")
        if not hasattr(mask, "sees"):
            self.objections.append(f"makes an attention mask of its own {where}")
        elif not _sees_window(mask.sees, window):
            self.objections.append(f"masks its attention {where} other than causally within its window")


RUN_OPTIONS = ("input_ids", "position_ids", "use_cache", "attention_metadata")  # arguments of the model's call


@dataclass(frozen=True)
class Examination:
    """What a dry run found."""

    objection: str | None  # why a model cannot be decoded, as the predicate of a sentence
    values_per_token: int = 0  # cached numbers per token
    window: int | None = None  # the shortest sliding window of a layer


def refuse_undecodable(model: type[PreTrainedModel], config: PreTrainedConfig, prefix: str = "") -> None:
    """Raise UserError if models of this class and config cannot be decoded correctly."""
    objection = examine(model, config).objection
    if objection is not None:
        raise UserError(f"{prefix}{model.__name__} {objection}; decoding cannot hold that, use another backbone")


def backbone_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that AutoModel would choose. Raises UserError if there is none."""
    if type(config) not in MODEL_MAPPING:
        raise UserError(f"expected a language model, found a config of type {config.model_type!r}")
    chosen = MODEL_MAPPING[type(config)]
    return chosen[0] if isinstance(chosen, tuple) else chosen


def examine(model: type[PreTrainedModel], config: PreTrainedConfig) -> Examination:
    """A dry run of a backbone, in some tenths of a second; equal configs are tried once."""
    return _examine(model, _Config(config))


class _Config:
    """A config as a cache key, compared by content."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config, self.content = config, config.to_json_string(use_diff=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config) and (type(self.config), self.content) == (type(other.config), other.content)

    def __hash__(self) -> int:
        return hash(self.content)


@lru_cache(maxsize=64)
def _examine(model: type[PreTrainedModel], key: _Config) -> Examination:
    config = deepcopy(key.config)
    for rope in _ropes(config):
        if "dynamic" in rope["rope_type"]:  # it depends on the positions; `refuse_too_long` handles it
            rope["rope_type"] = "default"
    try:
        with torch.device("meta"), torch.inference_mode(), _unvalidated_distributions():
            body = model(config).get_decoder().eval()
            layers = DynamicCache(config=body.config).layers
            for index, layer in enumerate(layers):
                state = isinstance(layer, CacheLayerMixin | LinearAttentionCacheLayerMixin)
                if state and type(layer) not in PLAIN:
                    return Examination(f"keeps more than keys and values in layer {index} ({type(layer).__name__})")
            if not body._supports_attention_backend:
                return Examination("does not let its attention be replaced (`_supports_attention_backend`)")
            if "position_ids" not in signature(body.forward).parameters:
                return Examination("takes no position_ids")
            run = _dry_run(body)
    except Exception as error:  # anything may fail on `meta`, such as reading a value
        return Examination(f"fails a dry run without weights ({reason(error)})")
    keeping = [index for index, layer in enumerate(layers) if isinstance(layer, PLAIN)]
    for layer in sorted({*keeping, *run.calls}):
        if run.calls[layer] != 1:
            return Examination(f"calls its attention {run.calls[layer]} times in layer {layer}, expected once")
    objection = run.objections[0] if run.objections else None
    return Examination(objection, run.values_per_token.total(), min(run.windows, default=None))


@contextmanager
def _unvalidated_distributions() -> Iterator[None]:
    """Disable argument checks of distributions, which read values; `torch.compile` does the same."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)


def refuse_too_long(config: PreTrainedConfig, length: int, what: str) -> None:
    """Raise UserError if a sequence exceeds the model's positions; warn if it exceeds those seen in training.

    Learned positions end. Rope can be computed for any position, but if its frequencies depend on the length of the
    sequence (types dynamic and longrope), tokens beyond the original length would change earlier ones, and those of
    other sequences in the same forward.
    """
    text = config.get_text_config()
    limit, why = getattr(text, "max_position_embeddings", None), "has a table of"
    ropes = _ropes(config)
    for rope in ropes:
        original = rope.get("original_max_position_embeddings", limit)
        if _depends_on_length(rope) and length > original:
            limit, why = original, f"keeps the frequencies of its rope ({rope['rope_type']}) for"
            break
    else:
        if limit is None or length <= limit:
            return
        if ropes:
            _warn_untrained(text.model_type, limit)
            return
    raise UserError(
        f"{what} can take {length} positions, and the model ({text.model_type}) {why} {limit}; expected a shorter text"
        ", or a lower max_new_tokens"
    )


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The parameters of rope: one for all layers, or one for each kind of layer; empty without rope."""
    ropes = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [ropes] if "rope_type" in ropes else [rope for rope in ropes.values() if rope]


def keeps_contexts(body: PreTrainedModel) -> bool:
    """Whether the keys and values of a context are all that what follows needs of it, whatever that is."""
    found = examine(type(body), body.config)
    return found.objection is None and found.window is None and not any(map(_depends_on_length, _ropes(body.config)))


def _depends_on_length(rope: dict[str, Any]) -> bool:
    return "dynamic" in rope["rope_type"] or rope["rope_type"] == "longrope"


@lru_cache
def _warn_untrained(kind: str, limit: int) -> None:
    logger.warning(
        "sequences can become longer than the %s positions of the model (%s): what it writes beyond them is as "
        "transformers computes it, and no better than the model",
        limit,
        kind,
    )


def _dry_run(body: PreTrainedModel) -> DryRun:
    body.set_attn_implementation(PROBE)
    body.set_experts_implementation("batched_mm")  # its shapes do not depend on the routing
    kinds = _drop_repeated_layers(body)
    run, ids = DryRun(), torch.zeros(1, 4, dtype=torch.long)
    options = {"input_ids": ids, "position_ids": ids, "use_cache": False, "attention_metadata": run}
    output = body(**options, attention_mask=torch.ones_like(ids))
    if getattr(output, "last_hidden_state", None) is None:
        run.objections.append("returns no last_hidden_state")
    for layer in range(len(run.calls), len(kinds)):  # as the first layer of its kind
        first = kinds.index(kinds[layer])
        run.calls[layer] = run.calls[first]
        run.values_per_token[layer] = run.values_per_token[first]
    return run


def _drop_repeated_layers(body: PreTrainedModel) -> list[str]:
    """Keep the first layers of a body up to the first of each kind: operations on `meta` are slow.

    Returns each layer's kind: its modules, their attributes, and its entry in the config.
    """
    count, types = body.config.num_hidden_layers, getattr(body.config, "layer_types", None)
    for layers in body.children():
        if isinstance(layers, torch.nn.ModuleList) and len(layers) == count:
            kinds = [f"{types and types[index]} {_kind(layer)}" for index, layer in enumerate(layers)]
            del layers[max(map(kinds.index, kinds)) + 1 :]
            return kinds
    return []


def _kind(layer: torch.nn.Module) -> str:
    plain = (bool, int, float, str, type(None))
    attributes = (
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, plain) and key != "layer_idx"
    )
    return f"{layer} {sorted(map(repr, attributes))}"


def _sees_window(sees: Any, window: int | None) -> bool:
    """Whether a mask is causal, within the window if there is one."""
    keys = torch.arange(FAR + 2, device="cpu")
    for query in (FAR, FAR + 1):
        first = 0 if window is None else query + 1 - window
        arguments = (torch.tensor(index, device="cpu") for index in (0, 0, query))
        try:
            seen = sees(*arguments, keys).expand_as(keys)
        except RuntimeError:  # it depends on more than two positions
            return False
        if not torch.equal(seen, (keys >= first) & (keys <= query)):
            return False
    return True


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    *,
    attention_metadata: DryRun | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Record the arguments; returns a tensor without data (1, tokens, heads, width of the values)."""
    if attention_metadata is None:
        raise ValueError("arguments that it does not know do not reach its attention")
    attention_metadata.see(module.layer_idx, key, value, attention_mask, options)
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3]), None


class _Mask(torch.Tensor):
    """A mask with its mask function as `sees`; a mask that a model computes from it has none."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = super().__torch_function__(function, types, args, kwargs)
        whole = function is torch.Tensor.__getitem__ and result.shape == args[0].shape  # a slice of everything
        if whole and hasattr(args[0], "sees"):
            result.sees = args[0].sees
        return result


def _mask(q_length: int, kv_length: int, mask_function: Any, **unused: Any) -> _Mask:
    mask = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool).as_subclass(_Mask)
    mask.sees = mask_function
    return mask


AttentionInterface.register(PROBE, _attend)
AttentionMaskInterface.register(PROBE, _mask)
