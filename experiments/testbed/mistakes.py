"""Why a solution of the testbed is wrong: its arithmetic, or its steps."""

import re
from operator import add, mul, sub, truediv

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
OPERATIONS = {"+": add, "-": sub, "*": mul, "/": truediv}


def has_false_equation(solution: str) -> bool:
    """Whether the text has a false equation, such as `7 * 6 = 44`. Wrong steps do not count: a misread question mostly
    leads to true equations."""
    return any(not _holds(*equation) for equation in EQUATION.findall(solution))


def _holds(left: str, sign: str, right: str, result: str) -> bool:
    return not (sign == "/" and int(right) == 0) and OPERATIONS[sign](int(left), int(right)) == int(result)
