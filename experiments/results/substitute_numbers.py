"""More word problems: MAWPS's training problems with other numbers.

    python experiments/results/substitute_numbers.py OUTPUT.jsonl [--variants 2] [--seed 0]

Replaces each whole number that the equation and the question share by another of as many digits, where the result
stays a whole number of at least 0. Writes the originals too; the lines have the format of dataset/word_problems
(`task=mawps data_file=OUTPUT.jsonl`). Reads the training split alone.
"""

import argparse
import ast
import json
import math
import operator
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "dataset" / "word_problems" / "mawps_train.jsonl"
NUMBER = re.compile(r"(?<![\d.,])\d+(?![\d,]|\.\d)")
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
TRIES = 50


def value(node: ast.AST, lowest: float = -math.inf) -> Fraction:
    """Of an equation's left side. Raises ValueError, KeyError or ZeroDivisionError where it has none, and ValueError
    where a step is below `lowest`."""
    if isinstance(node, ast.Expression):
        return value(node.body, lowest)
    if isinstance(node, ast.BinOp):
        result = OPERATIONS[type(node.op)](value(node.left, lowest), value(node.right, lowest))
        if result < lowest:
            raise ValueError(result)
        return result
    if isinstance(node, ast.Constant):
        return Fraction(str(node.value))
    raise ValueError(node)


def substituted(question: str, equation: str, draw: random.Random) -> tuple[str, str, int] | None:
    """The problem with other numbers and its answer; None if its numbers cannot be told apart or fit no other."""
    numbers = NUMBER.findall(question)
    used = [number for number in dict.fromkeys(NUMBER.findall(equation)) if numbers.count(number) == 1]
    if not used or re.search(r"\d\.\d", equation):
        return None
    for _ in range(TRIES):
        new = {number: str(draw.randrange(10 ** (len(number) - 1), 10 ** len(number))) for number in used}
        text = [NUMBER.sub(lambda match, new=new: new.get(match[0], match[0]), part) for part in (question, equation)]
        try:
            result = value(ast.parse(text[1].strip(), mode="eval"), lowest=0)
        except (ValueError, ZeroDivisionError):
            continue
        if result.denominator == 1 and len(set(new.values())) == len(new):
            return text[0], text[1], int(result)
    return None


def problems(variants: int, seed: int) -> Iterator[dict[str, str]]:
    """Each training problem and up to `variants` others made from it."""
    for index, line in enumerate(SOURCE.read_text(encoding="utf-8").splitlines()):
        record = json.loads(line)
        yield record
        equation, draw = record["answer"].split("####")[0], random.Random(f"{seed}/{index}")
        made = {record["question"]}
        for _ in range(variants):
            if (other := substituted(record["question"], equation, draw)) and other[0] not in made:
                made.add(other[0])
                yield {"question": other[0], "answer": f"{other[1].strip()} #### {other[2]}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--variants", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    lines = [json.dumps(record) + "\n" for record in problems(arguments.variants, arguments.seed)]
    arguments.output.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} problems in {arguments.output}")


if __name__ == "__main__":
    main()
