"""More word problems: MAWPS's training problems with other numbers.

    PYTHONPATH=. python experiments/results/substitute_numbers.py OUTPUT.jsonl [--variants 2] [--seed 0]

Replaces each whole number that the equation and the question share by another of as many digits, where the result
stays a whole number of at least 0. Writes the originals too; the lines have the format of dataset/word_problems
(`task=mawps data_file=OUTPUT.jsonl`). Reads the training split alone.
"""

import argparse
import ast
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from llm2.decoding.arithmetic import value_of

SOURCE = Path(__file__).parents[2] / "dataset" / "word_problems" / "mawps_train.jsonl"
NUMBER = re.compile(r"(?<![\d.,])\d+(?![\d,]|\.\d)")
TRIES = 50


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
            tree = ast.parse(text[1].strip(), mode="eval").body
            result, steps = value_of(tree), [value_of(node) for node in ast.walk(tree) if isinstance(node, ast.BinOp)]
        except (ValueError, ZeroDivisionError):
            continue
        if result.denominator == 1 and min(steps, default=0) >= 0 and len(set(new.values())) == len(new):
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
