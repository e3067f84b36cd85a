"""Triplets for arithmetic alone: right equations, and every other digit of their results as a negative.

    PYTHONPATH=. python experiments/results/equations.py OUTPUT.jsonl --model SYSTEM1 [--solutions 1500 --equations 10]

The equations are those of MAWPS's training problems with other numbers (`substitute_numbers.py`), many in one answer:
`57 - 23 = 34. 8 * 6 = 48. ...`. No model is run. At each digit of a result, and where it ends, the other digits are the
negatives (and the end, where digits follow). SYSTEM1 names the tokenizer, which must have a token for each digit.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from experiments.results.substitute_numbers import SOURCE, substituted
from llm2.common.chat import encode_chats, resolve_template
from llm2.common.loading import load_tokenizer
from llm2.tasks.word_problems import to_problem
from llm2.verifier.triplets import Triplet, record_line

QUESTION = "Calculate."
TEMPLATE = "chatml-plain"


def equations(draw: random.Random) -> Iterator[str]:
    """Endless, as the task's solutions write them: `57 - 23 = 34`."""
    records = [json.loads(line) for line in SOURCE.read_text(encoding="utf-8").splitlines()]
    while True:
        record = draw.choice(records)
        if made := substituted(record["question"], record["answer"].split("####")[0], draw):
            yield to_problem("", made[0], f"{made[1]} #### {made[2]}").solution.split(". The answer")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--solutions", type=int, default=1500)
    parser.add_argument("--equations", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer, source = load_tokenizer(arguments.model), equations(random.Random(arguments.seed))
    digits = [tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"]
    end = tokenizer.convert_tokens_to_ids(".")
    equals = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("1 = 1")[1])
    lines = []
    for index in range(arguments.solutions):
        made = [next(source) for _ in range(arguments.equations)]
        text = ". ".join(made) + "."
        messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": text}]
        (ids,) = encode_chats(tokenizer, [messages], resolve_template(TEMPLATE))
        triplets, first = [], None  # position of a result's first digit
        for position, token in enumerate(ids):
            if token == equals:
                first = position + 2  # a space is between
            elif first is not None and position >= first:
                others = [*digits, *([end] if position > first else [])]
                triplets += [Triplet(position, token, other) for other in others if other != token]
                first = None if token == end else first
        golds = list(dict(triplet[:2] for triplet in triplets).values())
        assert tokenizer.decode(golds) == "".join(f"{equation.split('= ')[1]}." for equation in made), text
        lines.append(record_line(messages, triplets, id=f"equations-{index}"))
    arguments.output.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} solutions, {arguments.solutions * arguments.equations} equations in {arguments.output}")


if __name__ == "__main__":
    main()
