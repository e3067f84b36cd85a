"""The key `accept`: code that reads whole solutions and refuses some, such as a unit test or a checker of units."""

from collections.abc import Callable
from functools import lru_cache

from llm2.common.code import load_code
from llm2.errors import UserError, as_user_error

KEY = "key 'accept'"
AcceptFn = Callable[[str, str], bool]


def load_accept(name: str | None) -> AcceptFn | None:
    """The function of a question and a solution's text that MODULE:FUNCTION names.

    Raises UserError if there is none, and, where it is called, if it fails or returns no bool.
    """
    if name is None:
        return None
    function = load_code("accept", name, "MODULE:FUNCTION of a question and a solution's text")
    if not callable(function) or isinstance(function, type):
        raise UserError(f"{KEY}: {name!r} is no function")

    @lru_cache(maxsize=4096)  # samples of a problem are often equal, and what a search chose is asked about twice
    def accepts(question: str, text: str) -> bool:
        with as_user_error(f"{KEY}: {name!r} fails"):
            accepted = function(question, text)
        if not isinstance(accepted, bool):
            raise UserError(f"{KEY}: {name!r} returned {accepted!r}, expected True or False")
        return accepted

    return accepts
