"""YAML files and `key=value` overrides -> a config dataclass, with errors of one sentence, and the text of --help."""

import difflib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from llm2.common.files import read_text, write_text
from llm2.common.home import with_home, without_home
from llm2.errors import UserError, misfit, quote, reason

Config = TypeVar("Config")
MAX_DEPTH = 50  # of lists and mappings in a file or an override


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `2e-5` as a number, `010` as ten, `1:30` as text; in YAML 1.1 they are text, eight, 90.

    It refuses repeated keys, values that contain themselves, and deep nesting, since parsing time grows with the
    square of the depth.
    """

    depth = 0

    def construct_document(self, node: yaml.Node) -> Any:
        self.deep_construct = True  # construct values whole: a self-referencing one fails
        return super().construct_document(node)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth == MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        first: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in first and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {name!r} is already on line {first[name]}", problem_mark=key.start_mark
                )
            first[name] = line
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        """JSON, which is YAML but for this, writes an emoji as two surrogates."""
        return super().construct_scalar(node).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")

    def construct_whole(self, node: yaml.ScalarNode) -> int | str:
        if node.value.lstrip("+-").isdigit():
            return int(node.value)
        return node.value if ":" in node.value else self.construct_yaml_int(node)

    def construct_decimal(self, node: yaml.ScalarNode) -> float | str:
        return node.value if ":" in node.value else self.construct_yaml_float(node)


# YAML's own errors, and those of int, float and datetime for texts like `0b_`.
YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_decimal)


def load_config(cls: type[Config], path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file of `cls`'s fields (or none), apply `key=value` overrides (values are YAML too), validate.

    Raises UserError that names the file, the line (or the override), the key, and the values found and expected.
    """
    values, places = ({}, {}) if path is None else read_file(path)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"the override {override!r} is not of the form key=value")
        values[key], places[key] = _parse_override(override, text), f"override {quote(override)}"
    for key in values:
        if not str(key).isprintable():  # pydantic fails on such names
            raise UserError(f"{places.get(key, path)}: found the key {quote(key)}, expected a name")
    try:
        return cls(**_tuples(values))
    except ValidationError as error:
        raise UserError(_explain(error, cls, path, places)) from None


def as_dict(config: Any) -> dict[str, Any]:
    """The resolved fields as plain values, ready for YAML or JSON; the home folder is `~`."""
    return without_home(TypeAdapter(type(config)).dump_python(config, mode="json"))


def write_config(config: Any, path: str | Path) -> None:
    write_text(path, yaml.safe_dump(as_dict(config), sort_keys=False))


def difference(earlier: Mapping[str, Any], config: Any, but: Collection[str]) -> str | None:
    """The first key whose value differs from the earlier run, except the keys `but`, as a clause."""
    for key, value in as_dict(config).items():
        if key not in but and without_home(earlier.get(key)) != value:
            return f"{key} was {earlier.get(key)!r} and now is {value!r}"
    return None


def read_values(path: str | Path) -> dict[str, Any]:
    """The plain values of a file that `write_config` wrote."""
    return read_file(path)[0]


def read_file(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's values and, for each key, its file and line."""
    text = read_text(path, "config")
    try:
        node = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)
    except YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else f"{path}"
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or reason(error)}") from error
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines, found a {type(values).__name__}")
    places = {str(key.value): f"{path}, line {key.start_mark.line + 1}" for key, _ in node.value}
    return {str(key): value for key, value in values.items()}, places


def _parse_override(override: str, text: str) -> Any:
    try:
        *_, last = (token for token in yaml.scan(text, Loader=_Loader) if not isinstance(token, yaml.StreamEndToken))
        if text[last.end_mark.index :].strip().startswith("#"):  # YAML would read a part alone
            raise UserError(f"the override {quote(override)} holds a comment; put the value into quotes within quotes")
        return yaml.load(text, Loader=_Loader)
    except YAML_ERRORS as error:
        raise UserError(f"the value of the override {quote(override)} is not valid YAML") from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Turn YAML's lists into the tuples of the frozen configs, and expand `~` in paths."""
    return {key: with_home(tuple(value) if isinstance(value, list) else value) for key, value in values.items()}


def _explain(error: ValidationError, cls: type, path: str | Path | None, places: dict[str, str]) -> str:
    """The first mistake, in one sentence."""
    unknown = ("unexpected_keyword_argument", "extra_forbidden")
    first = min(error.errors(), key=lambda detail: detail["type"] not in unknown)  # misspelt before missing
    key = str(first["loc"][0])
    where = places.get(key, path)
    if first["type"] in unknown:
        near = difflib.get_close_matches(key, cls.__dataclass_fields__, 1, cutoff=0)[0]
        return f"{where}: unknown key {key!r}; did you mean {near!r}? --help lists all keys"
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        hint = "in it" if path else "in a config file"
        return f"{f'{path}: ' if path else ''}the key {key!r} is missing: expected {key}=VALUE here or {hint}"
    return f"{where}: key {key!r}: {misfit(first)}"


def help_text(cls: type) -> str:
    """Every key of a config with its type, default and sentence, the required ones first."""
    keys = sorted(_describe_keys(cls), key=lambda key: "(default " in key[0])
    return "\n".join(f"  {head}\n      {text}" if text else f"  {head}" for head, text in keys)


def _describe_keys(cls: type) -> Iterator[tuple[str, str]]:
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
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[key]}" for key, sign in bounds.items() if key in field]
    return " ".join([field.get("const") or field.get("type", "value"), ", ".join(limits)]).strip()
