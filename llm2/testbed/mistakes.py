"""Why a solution of the testbed is wrong: its arithmetic, or its steps."""

import re
from operator import add, mul, sub, truediv

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
OPERATIONS = {"+": add, "-": sub, "*": mul, "/": truediv}


def has_false_equation(solution: str) -> bool:
    """Whether an equation of the text, such as `7 * 6 = 44`, does not hold. Steps that do not belong there are no
    matter: those of a misread question hold as a rule."""
    return any(not _holds(*equation) for equation in EQUATION.findall(solution))


def _holds(left: str, sign: str, right: str, result: str) -> bool:
    return not (sign == "/" and int(right) == 0) and OPERATIONS[sign](int(left), int(right)) == int(result)
