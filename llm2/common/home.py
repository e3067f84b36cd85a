"""Paths in files that people share: the home folder, and so the user's name, is written `~`."""

import os
from typing import Any


def without_home(value: Any) -> Any:
    """The value with the home folder replaced by `~` at the start of texts, also in lists and mappings."""
    if isinstance(value, dict):
        return {key: without_home(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(without_home, value))
    home = os.path.expanduser("~").rstrip("/")
    if isinstance(value, str) and home and (value == home or value.startswith(f"{home}/")):
        return f"~{value.removeprefix(home)}"
    return value


def with_home(value: Any) -> Any:
    """The value with `~` at the start of texts replaced by the home folder."""
    if isinstance(value, list | tuple):
        return type(value)(map(with_home, value))
    return os.path.expanduser(value) if isinstance(value, str) and (value == "~" or value.startswith("~/")) else value
