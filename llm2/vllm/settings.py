"""The keys `llm2_*` of an engine (`additional_config`) and of a request (`extra_args`, in HTTP `vllm_xargs`). Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from llm2.config import GuidanceConfig
from llm2.errors import UserError, first_misfit

PROCESSOR = "llm2.vllm:GuidedProcessor"
TRANSFORMERS = "llm2.vllm:TransformersProcessor"
PREFIX = "llm2_"
OFF = "off"  # value of beta for a plain request to an engine that guides by default
REQUEST_KEYS = tuple(PREFIX + key for key in GuidanceConfig.__dataclass_fields__)
LOGITS_PROCESSOR = PREFIX + "logits_processor"
NO_PENALTY = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
ENGINE_KEYS = (PREFIX + "verifier", LOGITS_PROCESSOR, *REQUEST_KEYS)


@dataclass(frozen=True)
class EngineSettings:
    """The settings of an engine.

    Args:
        verifier: folder or hub id of System 2.
        default: guidance of requests without `llm2_beta`; None leaves them plain.
        values: alpha and top_k of requests that do not set them.
    """

    verifier: str
    default: GuidanceConfig | None
    values: Mapping[str, Any]


def engine_settings(additional_config: Any) -> EngineSettings:
    """Parse an engine's keys. Raises UserError if one is unknown, missing or out of range."""
    keys = _engine_keys(additional_config)
    keys.pop(LOGITS_PROCESSOR, None)
    verifier = keys.pop("llm2_verifier", None)
    if not isinstance(verifier, str):
        raise UserError(f"additional_config: llm2_verifier: found {verifier!r}, expected a verifier's folder or hub id")
    default = _guidance(keys, "additional_config")
    return EngineSettings(verifier, default, {k: v for k, v in keys.items() if k != "llm2_beta"})


def processor_name(additional_config: Any) -> str:
    """The MODULE:CLASS of an engine's keys. Raises UserError if there is none."""
    name = _engine_keys(additional_config).get(LOGITS_PROCESSOR)
    if not isinstance(name, str):
        raise UserError(f"additional_config: {LOGITS_PROCESSOR}: found {name!r}, expected MODULE:CLASS of a processor")
    return name


def request_guidance(
    extra_args: Mapping[str, Any] | None, engine: EngineSettings | None = None
) -> GuidanceConfig | None:
    """How a request is guided; None for a plain one. Raises UserError if a key is unknown or out of range.

    Args:
        engine: its settings; None, if they are unknown, only checks the keys.
    """
    values = _own_keys(extra_args or {}, REQUEST_KEYS, "request")
    if values.get("llm2_beta") == OFF:
        return None
    if engine is not None:
        default = {} if engine.default is None else {"llm2_beta": engine.default.beta}
        values = {**default, **engine.values, **values}
    elif "llm2_beta" not in values:
        _guidance({**values, "llm2_beta": 0.0}, "request")  # the engine may have a default beta
        return None
    return _guidance(values, "request")


def guidance_args(guidance: GuidanceConfig | None) -> dict[str, float | int]:
    """The `extra_args` of a request (`vllm_xargs` in HTTP); empty for a plain one."""
    values = {} if guidance is None else guidance.guidance_kwargs()
    return {PREFIX + key: value for key, value in values.items() if value is not None}


def _engine_keys(additional_config: Any) -> dict[str, Any]:
    return _own_keys(additional_config if isinstance(additional_config, dict) else {}, ENGINE_KEYS, "additional_config")


def _own_keys(values: Mapping[str, Any], known: tuple[str, ...], where: str) -> dict[str, Any]:
    own = {key: value for key, value in values.items() if str(key).startswith(PREFIX)}
    for key in own:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}, expected one of {', '.join(known)}")
    return own


def _guidance(values: Mapping[str, Any], where: str) -> GuidanceConfig | None:
    """Validated guidance; None without beta."""
    try:
        checked = GuidanceConfig(**{key.removeprefix(PREFIX): value for key, value in values.items()})
    except ValidationError as error:
        raise UserError(f"{where}: {PREFIX}{first_misfit(error)}") from None
    if checked.alpha == 0 or checked.beta is None:
        raise UserError(
            f"{where}: llm2_alpha, llm2_beta: found {checked.alpha} and {checked.beta}, expected alpha above 0 and a "
            "number as beta"
        )
    return checked if "llm2_beta" in values else None
