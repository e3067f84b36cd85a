"""The kinds of a verifier, and the keys by which earlier versions named them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from llm2.errors import UserError, shown


class Parts(NamedTuple):
    """What a kind is made of, as a verifier's config.json has it."""

    score: str  # `candidate`: read from the state at the scored token; `prefix`: from the state before it
    head: str | None = None  # a head on System 1's states; None for all layers
    adapter: bool = False  # LoRA on System 1's frozen layers


KINDS = {
    "full": Parts("candidate"),
    "lora": Parts("candidate", adapter=True),
    "prefix": Parts("prefix"),
    "prefix_lora": Parts("prefix", adapter=True),
    "bilinear": Parts("prefix", head="bilinear"),
    "mlp": Parts("prefix", head="mlp"),
}


def kind_of(score: Any, head: Any, adapter: bool) -> str:
    """Raises UserError for parts that are of no kind."""
    for kind, parts in KINDS.items():
        if parts == (score, head, adapter):
            return kind
    adapted = " with LoRA" if adapter else ""
    raise UserError(
        f"score: found {shown(score)} with prefix_head: {shown(head)}{adapted}, expected kind: {', '.join(KINDS)}"
    )


def with_kind(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `train` by today's names: earlier versions told the kind by `score`, `prefix_head` and `lora_r`.

    Raises UserError where these contradict each other, or stand beside `kind`.
    """
    values, adapter = dict(values), values.get("lora_r") is not None
    earlier = {key: values.pop(key) for key in ("score", "prefix_head") if key in values}
    if "kind" in values and earlier:
        raise UserError(f"{min(earlier)}: found it beside kind: {shown(values['kind'])}, which says it; leave it out")
    if "kind" in values or not (earlier or adapter):
        return values
    head = earlier.get("prefix_head")
    return {"kind": kind_of(earlier.get("score", "prefix" if head else "candidate"), head, adapter), **values}
