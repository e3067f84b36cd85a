"""For the key `accept`: does a one-sentence solution compute with the numbers of its problem, to no negative result?

`27 + 41 = 68. The answer is 68.` is accepted for a problem that holds 27 and 41, in digits or as words. Each number may
be used as often as it stands there. Constants, which MAWPS's equations write with decimals, are free: 12.0, 0.01.
Of MAWPS's 1,434 gold solutions for training 1,419 are accepted; the rule was written on its validation problems.

    PYTHONPATH=. python experiments/results/problem_numbers.py
"""

import re
from collections import Counter

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+")
NEGATIVE = re.compile(r"(=|is)\s*-")
CONSTANT = re.compile(r"\d+\.0|0\.(01|25|5)")
UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
WORDS = {word: str(value) for value, word in enumerate(UNITS)}
WORDS |= {"dozen": "12", "half": "2", "twice": "2", "double": "2", "triple": "3"}


def accept(question: str, text: str) -> bool:
    """Whether the left side of the text's equation has the question's numbers, and no result is negative."""
    left, equals, _ = text.partition("=")
    if not equals or NEGATIVE.search(text):
        return False
    used = Counter(number for number in numbers(left) if not CONSTANT.fullmatch(number))
    return used <= given(question)


def numbers(text: str) -> list[str]:
    return [number.replace(",", "") for number in NUMBER.findall(text)]


def given(question: str) -> Counter[str]:
    """The numbers of a question, and how often it holds each; those in words count once."""
    found = Counter(numbers(question))
    words = {WORDS[word] for word in re.findall("[a-z]+", question.lower()) if word in WORDS}
    return found | Counter(words)


if __name__ == "__main__":
    from llm2.tasks import load_task

    problems = load_task("mawps").problems("train")
    accepted = sum(accept(problem.question, problem.solution) for problem in problems)
    print(f"{accepted} of {len(problems)} gold equations are accepted")
