"""The kinds of a verifier, and the keys by which earlier versions told them."""

from collections.abc import Mapping
from typing import Any

from llm2.errors import UserError, quote

# Kind -> the state that scores are read from, the head on System 1's states, whether there are LoRA adapters, as a
# verifier's config.json has them in `score`, `prefix_head` and `lora`.
KINDS = {
    "full": ("candidate", None, False),
    "lora": ("candidate", None, True),
    "prefix": ("prefix", None, False),
    "prefix_lora": ("prefix", None, True),
    "bilinear": ("prefix", "bilinear", False),
    "mlp": ("prefix", "mlp", False),
}
ADAPTERS, HEADS = ("lora", "prefix_lora"), ("bilinear", "mlp")
KINDS_WITH = {  # the keys that not every kind has
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"), ADAPTERS),
    "prefix_head_size": HEADS,
    "token_weight": ("prefix", "prefix_lora", *HEADS),
    "trainable_layers": ("full", "prefix"),  # System 1's layers are not saved with an adapter or a head
    "lm_loss_coef": ("full", "prefix", *ADAPTERS),
}


class OfKind:
    """What follows from the attribute `kind`."""

    @property
    def reads_candidates(self) -> bool:
        return KINDS[self.kind][0] == "candidate"

    @property
    def is_head(self) -> bool:
        return self.kind in HEADS

    @property
    def is_adapter(self) -> bool:
        return self.kind in ADAPTERS

    @property
    def is_whole(self) -> bool:
        """False for an adapter and a head, which are saved without System 1's weights."""
        return not (self.is_head or self.is_adapter)


def kind_of(score: Any, head: Any, adapter: bool) -> str:
    for kind, parts in KINDS.items():
        if parts == (score, head, adapter):
            return kind
    found = f"score: {quote(score)}, prefix_head: {quote(head)}{', LoRA' if adapter else ''}"
    raise UserError(f"found {found}, expected kind: {', '.join(KINDS)}")


def with_kind(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `train` by today's names, from `score` and `prefix_head`, or `lora_r` without `kind`.

    Raises UserError where these contradict each other, or stand beside `kind`.
    """
    earlier = {key: values[key] for key in ("score", "prefix_head") if key in values}
    adapter, head = values.get("lora_r") is not None, earlier.get("prefix_head")
    if "kind" in values and earlier:
        raise UserError(f"{min(earlier)}: found it beside kind: {quote(values['kind'])}, which says it; leave it out")
    if "kind" in values or not (earlier or adapter):
        return dict(values)
    kind = kind_of(earlier.get("score", "prefix" if head else "candidate"), head, adapter)
    return {"kind": kind, **{key: value for key, value in values.items() if key not in earlier}}
