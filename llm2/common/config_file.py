"""YAML files and `key=value` overrides -> a config dataclass, with errors of one sentence, and the text of --help."""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from llm2.errors import UserError

Config = TypeVar("Config")
# PyYAML lets through what int, float and datetime raise for texts like `0b_`, and what deep nesting raises.
PARSE_ERRORS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
LONGEST_SHOWN = 200  # characters of a value in an error message


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `2e-5` as a number; YAML 1.1 reads it as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(cls: type[Config], path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file of `cls`'s fields (or none), apply `key=value` overrides (values are YAML too), validate.

    Raises UserError that names the file, the line (or the override), the key, and the values found and expected.
    """
    values, origin = ({}, {}) if path is None else read_file(path)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"the override {override!r} is not of the form key=value")
        origin[key] = f"override {override!r}"
        _, values[key] = _parse(text, origin[key])
    for key in values:
        if key not in cls.__dataclass_fields__:
            near = difflib.get_close_matches(key, cls.__dataclass_fields__, 1, cutoff=0)[0]
            raise UserError(f"{origin[key]}: unknown key {key!r}; did you mean {near!r}? --help lists all keys")
    try:
        return cls(**_tuples(values))
    except ValidationError as error:
        raise UserError(_explain(error, path, origin)) from None


def as_dict(config: Any) -> dict[str, Any]:
    """The resolved fields as plain values, ready for YAML or JSON."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def write_config(config: Any, path: str | Path) -> None:
    Path(path).write_text(yaml.safe_dump(as_dict(config), sort_keys=False))


def difference(earlier: dict[str, Any], config: Any, may_differ: tuple[str, ...]) -> str | None:
    """The first key, other than those in `may_differ`, with another value than in the earlier run, as a clause."""
    for key, value in as_dict(config).items():
        if key not in may_differ and earlier.get(key) != value:
            return f"{key} was {earlier.get(key)!r} and now is {value!r}"
    return None


def read_values(path: str | Path) -> dict[str, Any]:
    """The plain values of a file that `write_config` wrote."""
    return read_file(path)[0]


def read_file(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's values and, for each key, its file and line."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None
    node, values = _parse(content, str(path))
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines, found a {type(values).__name__}")
    origin = dict.fromkeys(values, str(path))  # a merged key has no line of its own
    origin |= {key.value: f"{path}, line {key.start_mark.line + 1}" for key, _ in node.value}
    for key in values:
        if not isinstance(key, str):
            raise UserError(f"{path}: expected texts as keys, found {shown(key)}")
    return values, origin


def _parse(content: bytes | str, where: str) -> tuple[yaml.Node | None, Any]:
    """YAML as nodes, which know their lines, and as values."""
    try:
        return yaml.compose(content, Loader=_Loader), yaml.load(content, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", "it cannot be read")
        raise UserError(f"{where}{f', line {mark.line + 1}' if mark else ''}: not valid YAML: {problem}") from None
    except PARSE_ERRORS as error:
        raise UserError(f"{where}: not valid YAML: {str(error).partition(chr(10))[0]}") from None


def shown(value: Any) -> str:
    """A value in an error message, shortened; some integers are too long for repr."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """YAML has lists where the frozen configs have tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _explain(error: ValidationError, path: str | Path | None, origin: dict[str, str]) -> str:
    """The first mistake, in one sentence."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        hint = "in it" if path else "in a config file"
        return f"{f'{path}: ' if path else ''}the key {key!r} is missing: expected {key}=VALUE here or {hint}"
    expected = first["msg"][0].lower() + first["msg"][1:]
    where = origin.get(str(first["loc"][0]), path)
    return f"{where}: key {key!r}: found {shown(first['input'])}, expected: {expected}"


def help_text(cls: type) -> str:
    """Every key of a config with its type, default and sentence, the required ones first."""
    keys = sorted(_described(cls), key=lambda key: "(default " in key[0])
    return "\n".join(f"  {head}\n      {text}" if text else f"  {head}" for head, text in keys)


def _described(cls: type) -> Iterator[tuple[str, str]]:
    schema = TypeAdapter(cls).json_schema()
    for name, field in schema["properties"].items():
        # Only the class that declares a key holds its sentence.
        infos = (base.__dict__.get("__pydantic_fields__", {}).get(name) for base in cls.__mro__)
        text = next((info.description for info in infos if info and info.description), "")
        default = "" if name in schema.get("required", ()) else f" (default {json.dumps(field.get('default', {}))})"
        yield f"{name}: {_type_name(field, schema)}{default}", text


def _type_name(field: dict, schema: dict) -> str:
    if "$ref" in field:
        field = schema["$defs"][field["$ref"].rpartition("/")[2]]
    if "anyOf" in field:
        return " or ".join(_type_name(option, schema) for option in field["anyOf"])
    if "enum" in field:
        return " | ".join(field["enum"])
    if field.get("type") == "array":
        return f"list of {_type_name(field['items'], schema)}"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<="}
    limits = [f"{sign} {field[key]}" for key, sign in bounds.items() if key in field]
    return " ".join([field.get("const") or field.get("type", "value"), ", ".join(limits)]).strip()
