"""What a run reads, known by content: the SHA-256 of every file that the keys of its config name.

A path says where a file is, not what is in it. Whatever goes on from an earlier run (a journal, a results folder, a
checkpoint) compares these digests with those of that run, and refuses if one differs. They are taken before the files
are read: a file that changes in between is noticed by the next run.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import llm2
from llm2.common.files import write_text
from llm2.common.home import without_home
from llm2.errors import explained

Digests = dict[str, dict[str, str]]  # key -> name of a file, without its folder -> SHA-256, or a hub's commit

INPUTS = "inputs.json"
SHOWN = 12  # hexadecimal digits of a digest in sentences
READ_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")  # of what is loaded from a model's folder
NOT_READ = ("training.json", "trainer_state.json", INPUTS)


@dataclass(frozen=True)
class Reads:
    """Marks a key of a config that names what a run reads: a model or verifier, a file, or code (MODULE:NAME)."""

    kind: Literal["model", "file", "code"]


def digests(config: Any) -> Digests:
    """Of all that the marked keys of a config name; keys that name no file, or none that is there, are left out."""
    found = {}
    for key, field in type(config).__pydantic_fields__.items():
        kinds = [mark.kind for mark in field.metadata if isinstance(mark, Reads)]
        value = getattr(config, key)
        if not kinds or value is None:
            continue
        if isinstance(value, tuple):  # files, by their paths: two may have one name
            found[key] = {without_home(path): digest for path in value for digest in KINDS[kinds[0]](path).values()}
        else:
            found[key] = KINDS[kinds[0]](value)
    return {key: files for key, files in found.items() if files}


def change(earlier: Mapping[str, Any] | None, now: Digests, may_differ: tuple[str, ...] = ()) -> str | None:
    """The first file, but for those of the keys `may_differ`, with another content than earlier, as a clause."""
    if earlier is None:
        return "an older version of llm2 wrote it, which did not record the contents of what it read"
    for key in sorted((earlier.keys() | now.keys()) - {*may_differ}):
        before, after = earlier.get(key, {}), now.get(key, {})
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                then, found = (each[name][:SHOWN] if name in each else "absent" for each in (before, after))
                return f"the content of {name} (key {key!r}) has changed, SHA-256 {then} before and {found} now"
    return None


def write_inputs(folder: str | Path, inputs: Digests) -> None:
    write_text(Path(folder, INPUTS), json.dumps(inputs, indent=2) + "\n")


def read_inputs(folder: str | Path) -> Digests | None:
    """None where an older version of llm2 wrote the folder."""
    path = Path(folder, INPUTS)
    if not path.exists():
        return None
    with explained(f"{path}: expected digests as a run writes them"):
        return json.loads(path.read_text(encoding="utf-8"))


def _model(name: str) -> dict[str, str]:
    """Every file of a folder that a model, a tokenizer or a verifier is loaded from; the commit of a hub id."""
    from llm2.common.loading import is_local, model_path  # imports torch

    if not is_local(name):
        return _hub_commit(name)
    folder = Path(model_path(name))
    files = [path for path in folder.glob("*") if path.suffix in READ_SUFFIXES and path.name not in NOT_READ]
    if (folder / "latest").is_file() and not any(path.suffix == ".safetensors" for path in files):
        files += (folder / (folder / "latest").read_text().strip()).glob("*")  # DeepSpeed's shards
    return {path.name: _digest(path) for path in sorted(files) if path.is_file()}


def _hub_commit(name: str) -> dict[str, str]:
    from huggingface_hub import hf_hub_download

    with explained(f"model {name!r}: its commit on the hub is not known"):
        return {name: Path(hf_hub_download(name, "config.json")).parent.name}


def _file(name: str) -> dict[str, str]:
    """Other names, such as those of built-in templates, stand for what the package holds."""
    return {Path(name).name: _digest(Path(name))} if Path(name).is_file() else {}


def _code(name: str) -> dict[str, str]:
    """The module of MODULE:NAME, and the package's own tasks, which grade; what that module imports is not followed."""
    found, package = {}, Path(llm2.__file__).parent
    for folder in ("tasks", "testbed") if name.startswith("testbed") else ("tasks",):
        lines = [f"{path.name} {_digest(path)}" for path in sorted((package / folder).glob("*.py"))]
        found[f"llm2/{folder}"] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    module, colon, _ = name.partition(":")
    return found | (_file(_module_file(module)) if colon else {})


def _module_file(module: str) -> str:
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        spec = None
    return spec.origin if spec and spec.origin else f"{module.replace('.', '/')}.py"  # in the working directory


def _digest(path: Path) -> str:
    state = path.stat()
    return _digest_of(path, state.st_ino, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)  # a study asks for the same System 1 at each of its steps
def _digest_of(path: Path, *state: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


KINDS: dict[str, Callable[[str], dict[str, str]]] = {"model": _model, "file": _file, "code": _code}
