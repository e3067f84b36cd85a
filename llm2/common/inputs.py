"""Digests of what a run reads: the SHA-256 of every file that the keys of its config name.

Whatever continues an earlier run (a journal, a results folder, a checkpoint) compares these digests with those of that
run, and refuses to continue if one differs. They are computed before the files are read, so that the next run notices a
file that changes in between.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

import llm2
from llm2.common.config_file import as_dict, difference
from llm2.common.files import digest, write_text
from llm2.common.home import without_home
from llm2.common.keys import Mark, reads, select_keys
from llm2.errors import UserError, as_user_error

Digests = dict[str, dict[str, str]]  # key -> name of a file, without its folder -> SHA-256, or a hub's commit

INPUTS = "inputs.json"
SHOWN = 12  # hexadecimal digits of a digest in sentences
# What is loaded from the folder of a model or verifier.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
OTHERS = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer*.json", "vocab*.json", "*.jinja")
OTHERS += ("special_tokens_map.json", "added_tokens.json", "chat_template.json", "merges.txt", "vocab.txt", "*.model")


def digests(config: Any) -> Digests:
    """Digests of all files that the marked keys of a config name; keys without an existing file are left out."""
    found = {}
    for key, kind in reads(config).items():
        value, read = getattr(config, key), KINDS[kind]
        if isinstance(value, tuple):  # keyed by path, since two files may share a name
            found[key] = {without_home(path): content for path in value for content in read(path).values()}
        elif value is not None:
            found[key] = read(value)
    return {key: files for key, files in found.items() if files}


def record(config: Any, inputs: Digests) -> dict[str, Any]:
    """The config and digests that a run saves for a later `require_same`, as plain values."""
    return as_dict(config) | {"inputs": inputs}


def require_same(
    earlier: Mapping[str, Any], config: Any, inputs: Digests, what: str, way_out: str, but: Collection[str] = ()
) -> None:
    """Raise UserError unless the run with the `record` `earlier` had the same settings and inputs.

    Args:
        what: the subject of the error message: what is to be reused.
        but: keys that may differ here besides those marked HOW and WHICH.
    """
    but = {*but, *select_keys(config, Mark.HOW, Mark.WHICH)}
    if changed := difference(earlier, config, but):
        raise UserError(f"{what} is of another config: {changed}; {way_out}")
    if changed := change(earlier.get("inputs"), inputs, but):
        raise UserError(f"{what} is out of date: {changed}; {way_out}")


def change(earlier: Mapping[str, Any] | None, now: Digests, but: Collection[str] = ()) -> str | None:
    """The first file that changed since the earlier run, except those of the keys `but`, as a clause."""
    if earlier is None:
        return "an older version of llm2 wrote it, which did not record the contents of what it read"
    for key in sorted((earlier.keys() | now.keys()) - {*but}):
        before, after = earlier.get(key, {}), now.get(key, {})
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                if name not in before or name not in after:
                    return f"{name} (key {key!r}) is {'missing' if name in before else 'new'}"
                digest = f"SHA-256 {before[name][:SHOWN]} before and {after[name][:SHOWN]} now"
                return f"the content of {name} (key {key!r}) has changed, {digest}"
    return None


def as_digests(value: Any, where: str | Path) -> Digests | None:
    """Validate the digests that another run wrote to a file; None if an older version of llm2 wrote it."""
    with as_user_error(f"{where}: expected digests as a run writes them"):
        return TypeAdapter(Digests | None).validate_python(value)


def write_inputs(folder: str | Path, inputs: Digests) -> None:
    write_text(Path(folder, INPUTS), json.dumps(inputs, indent=2) + "\n")


def read_inputs(folder: str | Path) -> Digests | None:
    """The digests in a folder; None if an older version of llm2 wrote it."""
    path = Path(folder, INPUTS)
    if not path.exists():
        return None
    with as_user_error(f"{path}: expected digests as a run writes them"):
        return as_digests(json.loads(path.read_text(encoding="utf-8")), path)


def _model(name: str) -> dict[str, str]:
    """Every file of a folder that a model, a tokenizer or a verifier is loaded from; the commit of a hub id."""
    from llm2.common.loading import is_local, model_path  # imports torch

    if not is_local(name):
        return _hub_commit(name)
    folder = Path(model_path(name))
    weights = [path for pattern in WEIGHTS for path in folder.glob(pattern)]
    if not weights and (folder / "latest").is_file():  # DeepSpeed's shards
        weights = (folder / (folder / "latest").read_text().strip()).glob("*")
    files = {*weights, *(path for pattern in OTHERS for path in folder.glob(pattern))}
    return {path.name: digest(path) for path in sorted(files) if path.is_file() and not path.name.startswith(".")}


def _hub_commit(name: str) -> dict[str, str]:
    from huggingface_hub import hf_hub_download

    try:
        return {name: Path(hf_hub_download(name, "config.json")).parent.name}
    except Exception:  # the hub client's errors share no base class; loading reports them
        return {}


def _file(name: str) -> dict[str, str]:
    """The file; none for a built-in name, such as that of a chat template."""
    path = Path(name)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{name}: expected a file, found a pipe or device, which cannot be read twice")
    return {path.name: digest(path)} if path.is_file() else {}


def _results(name: str) -> dict[str, str]:
    return _file(f"{name}/predictions.jsonl")


def _code(name: str) -> dict[str, str]:
    """The file of the module in MODULE:NAME, and llm2's tasks, which grade; imports are not followed."""
    found, package = {}, Path(llm2.__file__).parent
    for folder in ("tasks", "testbed") if "testbed" in name else ("tasks",):
        files = (path for path in (package / folder).iterdir() if path.suffix in (".py", ".toml"))
        lines = [f"{path.name} {digest(path)}" for path in sorted(files)]
        found[f"llm2/{folder}"] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    module, colon, _ = name.partition(":")
    return found | (_file(_module_file(module)) if colon else {})


def _module_file(module: str) -> str:
    try:
        spec = find_spec(module)
    except Exception:  # raised by the user's package; reported when the module is imported
        spec = None
    return spec.origin if spec and spec.origin else f"{module.replace('.', '/')}.py"  # in the working directory


KINDS: dict[str, Callable[[str], dict[str, str]]]
KINDS = {"model": _model, "file": _file, "code": _code, "results": _results}
