"""Paths in files that people share: the home folder, and so the user's name, is written `~`."""

import os
from typing import Any


def without_home(value: Any) -> Any:
    """The same value, in which texts that begin with the home folder begin with `~`; lists and mappings too."""
    if isinstance(value, dict):
        return {key: without_home(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(without_home, value))
    home = os.path.expanduser("~").rstrip("/")
    if isinstance(value, str) and home and (value == home or value.startswith(f"{home}/")):
        return f"~{value.removeprefix(home)}"
    return value


def with_home(value: Any) -> Any:
    """The reverse."""
    if isinstance(value, list | tuple):
        return type(value)(map(with_home, value))
    return os.path.expanduser(value) if isinstance(value, str) and (value == "~" or value.startswith("~/")) else value
