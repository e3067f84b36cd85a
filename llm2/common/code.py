"""Code that a key names as MODULE:NAME."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from llm2.errors import UserError, as_user_error


def load_code(key: str, name: str, expected: str) -> Any:
    """What MODULE:NAME names, installed or in the working directory. Raises UserError if there is none."""
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(f"key {key!r}: found {name!r}, expected {expected}")
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)
    with as_user_error(f"key {key!r}: {name!r} cannot be imported"):
        return getattr(import_module(module), attribute)
