"""Whether a text's answer is the right one: the number checker of `grading`, or a function of the user's own."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from llm2.errors import UserError
from llm2.tasks.grading import is_correct

Checker = Callable[[str, str], bool]  # (text of a solution, gold answer)


def load_checker(name: str) -> Checker:
    """`number`, or MODULE:FUNCTION, where the module is installed or stands in the working directory."""
    if name == "number":
        return is_correct
    module, colon, function = name.partition(":")
    if not colon:
        raise UserError(f"key 'checker': found {name!r}, expected number or MODULE:FUNCTION")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"key 'checker': {name!r} cannot be had: {error}") from None
