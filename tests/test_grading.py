"""Every expectation here was derived by hand from the string beside it."""

import json
import random
import time
from fractions import Fraction
from pathlib import Path

import pytest

from llm2.tasks.grading import canonical, extract_answer, is_correct

GSM8K = Path(__file__).parents[2] / "shared" / "gsm8k"

FLEXIBLE = [
    # the format's marker
    ("She sold 24.\n#### 72", "72"),
    ("#### 72 clips", "72"),
    ("####72", "72"),
    ("####\n72", "72"),
    ("#### $1,080.00", "1080"),
    ("#### **72**", "72"),
    ("#### \\boxed{72}", "72"),
    ("#### -3", "-3"),
    ("#### 12 * 6 = 72", "72"),
    ("#### Final answer: 72", "72"),
    ("#### 70\nNo, wait.\n#### 72", "72"),
    ("#### 72 ####", "72"),
    ("#### 72\nThat is 6 dozen.", "72"),
    ("#### 72\n\nQ: Tom has 10 apples.\n#### 10", "72"),
    ("#### 5*3=<<5*3=15>>15", "15"),
    ("#### $<<9*2=18>>18", "18"),
    ("#### 10 to 12 apples", "10"),
    ("#### 18, since 9 * 2 = 18", "18"),
    ("#### 15 apples, 3 pears", "15"),
    ("#### 18\n\nNote: this assumes 7 days.", "18"),
    ("#### N/A", None),
    ("#### 72<|eot_id|><|start_header_id|>user 10", "72"),
    ("#### Step 1: the eggs\nThere are 72", "72"),
    ("Question: Tom has 5 apples?\nAnswer: 72", "72"),
    # "the answer is"
    ("So the answer is 32 / 2 = 16.", "16"),
    ("The answer is $32 \\div 2 = 16$.\nIt was 32.", "16"),
    ("THE ANSWER IS 5, not 6", "5"),
    ("The answer is 72 clips (24 in May).", "72"),
    ("So the answer is $1,080.00.", "1080"),
    ("The final answer is $\\boxed{72}$", "72"),
    ("The answer is:\n\n72", "72"),
    ("**The answer is:** 72", "72"),
    ("The answer is **$72**.", "72"),
    ("the answer is 48 + 24 = 72 clips.", "72"),
    ("The answer is 48/2 = 24, half of 48.", "24"),
    ("The answer to 3 + 4 is 7.", "7"),
    ("The answer is x = 5", "5"),
    ("The answer is 72, which is 48 more than 24.", "72"),
    ("The answer is 72 because 48 + 24 = 70 + 2.", "72"),
    ("The answer is 5. Let me check. The answer is 6.", "6"),
    ("The answer is the number of eggs. 9 * 2 = 18", "18"),
    ("The answer is not 5 but 2 * 3 = 6", "6"),
    ("His first answer was 400, so 1800 + 1400 = 3200", "3200"),
    ("Bob's answer is 48, Ann's 18 more: \\boxed{66}", "66"),
    # boxes and LaTeX
    ("We get \\boxed{24} and then \\boxed{72} in 2 months", "72"),
    ("\\boxed{\\$72}", "72"),
    ("\\boxed{72\\text{ clips in 2 months}}", "72"),
    ("\\boxed{x = 72}", "72"),
    ("\\boxed{\\dfrac{1}{3}}", "1/3"),
    ("\\boxed{-\\frac{3}{4}}", "-0.75"),
    ("$5 - \\frac{1}{2}$", "0.5"),
    ("$-\\$3$", "-3"),
    ("1{,}000", "1000"),
    ("10\\,000", "10000"),
    ("72\\%", "72"),
    ("$72^\\circ$", "72"),
    ("3 boxed lunches for 4 friends are 12 lunches", "12"),
    ("\\fbox{18} in 7 days", "18"),
    ("\\boxed{\\mathbf{18}} in 7 days", "18"),
    ("The answer is \\(\\mathbf{18}\\) for 3", "18"),
    ("The answer is \\text{18 dollars} for 3", "18"),
    # "final answer"
    ("Final answer: 18\n\nNote: this assumes 7 days.", "18"),
    ("FINAL ANSWER: 18\nCheck: 3 * 7 = 21", "18"),
    ("**Final Answer**: 18\nEach box costs 3.", "18"),
    ("**Final Answer:** $18 for 3 boxes", "18"),
    ("**Final Answer: 18** for 3 boxes", "18"),
    ("### Final Answer\n\n`18` dollars for 3 boxes", "18"),
    ("Final answer = 9 * 2 = 18 for 3 boxes", "18"),
    ("Final answer: 5. So the answer is 18 for 3", "18"),
    ("So the answer is 5. The final answer is 18 for 3", "18"),
    ("Final answer below. 9 * 2 = 18", "18"),
    ("Final answer:\n1. She sells 9 eggs.\n2. She makes 18 dollars.", "18"),
    # "answer:", unless it heads a solution
    ("Answer: 5", "5"),
    ("answer: 18 dollars (3 per box)", "18"),
    ("**Answer:** 18 dollars (3 per box)", "18"),
    ("**Answer**: 9 * 2 = 18 dollars (3 per box)", "18"),
    ("9 * 2 = 18\n*Answer* : 18\nCheck: 18 / 2 = 9", "18"),
    ("The answer is 48 for Bob.\nAnswer: 66 (2 more)", "66"),
    ("<answer> 18 dollars </answer> in 7 days", "18"),
    ("Answer: 16 - 7 = 9 eggs. 9 * 2 = $18", "18"),
    ("Answer: 16 eggs are laid.\n16 - 7 = 9", "9"),
    ("**Answer:**\n\n**1. Eggs** She sells 9.\n**2. Money** She makes 18.", "18"),
    ("<answer>16 - 7 = 9. 9 * 2 = 18</answer>", "18"),
    # another prompt behind a number
    ("#### 18\n\nProblem: Tom has 5.\n#### 5", "18"),
    ("18\nquestion 2: Tom has 5.", "18"),
    ("18\n\n**Question #2:** Tom has 5.", "18"),
    ("18\n\n**Problem**: Tom has 5.", "18"),
    ("18\n\n### Problem 12\nTom has 5.", "18"),
    ("18\n\nProblem 2", "18"),
    ("18\nQ2: Tom has 5.", "18"),
    ("18\nHuman: Tom has 5.", "18"),
    ("18\n\n### Instruction:\nTom has 5.", "18"),
    ("18\nUser: Tom has 5.\nAssistant: 5", "18"),
    ("18\nuser\nTom has 5.\nassistant\n5", "18"),
    ("18\n<|im_start|>user\nTom has 5.", "18"),
    ("18<|start_header_id|>user<|end_header_id|>\n\nTom has 5.", "18"),
    ("72</s> 10", "72"),
    ("72<|im_end|> 10", "72"),
    # a prompt before any number, and what is none
    ("Let me see.\nQuestion: How many are left?\n16 - 7 = 9", "9"),
    ("\nProblem: She has 16 eggs and eats 7.\nAnswer: 9\n\nProblem: Tom has 5.", "9"),
    ("<|im_start|>assistant\n18", "18"),
    ("She has 16.\nThe question: how many are left?\n9", "9"),
    ("16 eggs.\nProblem solving: 16 - 7 = 9", "9"),
    ("Q is 5.\nQ + 3 = 8", "8"),
    ("2 users\nUsers: 19", "19"),
    ("2 users\nUser 1: 5\nUser 2: 6\nThat is 11.", "11"),
    # no announcement: the last number
    ("48 + 24 = 72", "72"),
    ("She makes 9 * 2 = <<9*2=18>>18 dollars every day.", "18"),
    ("It is <<-47=-47>>-47.", "-47"),
    ("18.00", "18"),
    (".5", "0.5"),
    ("It costs $.50", "0.5"),
    ("The answer is £18.50 for 2", "18.5"),
    ("The answer is -€3 at 5 pm", "-3"),
    ("1e-05", "0.00001"),
    ("1E+16", "10000000000000000"),
    ("The answer is 1.5e3 for 2", "1500"),
    ("1e5678", "5678"),
    ("-3", "-3"),
    ("= -$3", "-3"),
    ("$-3", "-3"),
    ("- 72 clips", "72"),
    ("5-3", "3"),
    ("5\u20133", "3"),
    ("5 \u2013 3", "3"),
    ("\u20133", "-3"),
    ("The answer is \u22123 at 5 pm", "-3"),
    ("It is \u20113.", "-3"),
    ("10 - 3", "3"),
    ("$5-$3", "3"),
    ("3/4", "0.75"),
    ("1/3 of the cake", "1/3"),
    ("5 10/2", "5"),
    ("12/25/2024", "2024"),
    ("1,000", "1000"),
    ("1, 2", "2"),
    ("1,2", "2"),
    ("1,00,000 rupees", "100000"),
    ("\uff17\uff12", "72"),
    ("72%", "72"),
    ("Rs.500", "500"),
    ("72 USD", "72"),
    ("0.333...", "0.333"),
    ("-0", "0"),
    ("007", "7"),
    ("It is the 5th.", "5"),
    ("10 minus 3", "3"),
    ("18\n---", "18"),
    ("*18*", "18"),
    # nothing that can be read
    ("", None),
    ("no number", None),
    ("1/0", None),
    ("9" * 5000, None),
]

STRICT = [
    ("#### 72", "72"),
    ("The answer is 72.", "72"),
    ("The final answer is $\\boxed{72}$.", "72"),
    ("The correct answer is: **72**", "72"),
    ("\\boxed{72}", None),
    ("Answer: 72", None),
    ("Final answer: 72", None),
    ("The answer is £18.50 for 2.", "18.5"),
    ("The answer is 18.\n\nProblem: Tom has 5. The answer is 5.", "18"),
    ("18 dollars.\n\nProblem: Tom has 5. The answer is 5.", None),
    ("48 + 24 = 72", None),
    ("#### Step 1: 48 + 24", None),
    ("the answer is 70 + 2 = 72.", "72"),
    ("The answer is 70.\nThe answer is 72.", "72"),
    ("The answer is about 72.", None),
    ("The answer is unclear. 48 + 24 = 72", None),
]


@pytest.mark.parametrize(("text", "answer"), FLEXIBLE)
def test_flexible_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(("text", "answer"), STRICT)
def test_strict_answer(text, answer):
    assert extract_answer(text, "strict") == answer


@pytest.mark.parametrize(
    ("text", "gold", "correct"),
    [
        ("#### 18.00", "18", True),
        ("#### 18", "18.00", True),
        ("The answer is 1000", "1,000", True),
        ("The answer is 1/2", "0.5", True),
        ("The answer is 72%", "72", True),
        ("The answer is 72", "48 + 24 = <<48+24=72>>72\n#### 72", True),
        ("The answer is 3", "-3", False),
        ("The answer is 0.33", "1/3", False),
        ("no number", "no number", False),
        ("10000000000000000001", "10000000000000000000", False),
    ],
)
def test_answers_are_compared_as_numbers(text, gold, correct):
    assert is_correct(text, gold) is correct


@pytest.mark.parametrize(
    ("number", "form"),
    [("72", "72"), ("-1/2", "-0.5"), ("1/8", "0.125"), ("100/3", "100/3"), ("-1/100", "-0.01"), ("1/25", "0.04")],
)
def test_canonical_form_is_one_string_per_number(number, form):
    assert canonical(Fraction(number)) == form
    assert canonical(Fraction(form)) == form


@pytest.mark.long
@pytest.mark.parametrize(("split", "size"), [("test", 1319), ("train", 7473)])
def test_every_gold_solution_of_gsm8k_is_correct_against_itself(split, size):
    file = GSM8K / f"{split}.jsonl"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    golds = [json.loads(line)["answer"] for line in file.open(encoding="utf-8")]
    assert len(golds) == size
    for gold in golds:
        number = gold.rpartition("#### ")[2].replace(",", "")
        assert extract_answer(gold) == extract_answer(gold, "strict") == extract_answer(number) == number
        assert is_correct(gold, gold)


def garbage() -> dict[str, str]:
    """1 MB strings, each made to hurt one pattern or one loop."""
    size, rng = 1_000_000, random.Random(0)
    units = ["9", ".", "\n", " ", "#", "-", "\\", "{", "*", "$ ", "½", "\uff11", "\ud800", "\0", "1\n ", ",000", "1 / "]
    units += ["#### ", "#### 5", "the answer is ", "answer is: * ", "\\boxed{", "\\boxed{5}", "\\frac{1}{", "1,000,"]
    units += [
        "\nQ",
        "<|",
        "=1",
        "1 (",
        "####=",
        "{,}",
        "\\!",
        "1\nProblem 2",
        "\n### ",
        "answer: 5\n",
        "1e9",
        "\\text{",
    ]
    repeated = {unit: (unit * (size // len(unit) + 1))[:size] for unit in units}
    return repeated | {
        "lines, then digit": "\n" * size + "5",
        "hashes far from their number": "####" + " " * size + "5",
        "solutions under a heading": "answer: 5\n" * (size // 10) + "=",
        "random ASCII": "".join(chr(rng.randrange(128)) for _ in range(size)),
    }


def test_garbage_neither_throws_nor_takes_more_than_a_tenth_of_a_second():
    for name, text in garbage().items():
        for mode in ("flexible", "strict"):
            times = (seconds(text, mode) for _ in range(10))
            assert any(time < 0.1 for time in times), f"{name!r}: the best time, since others may use the core"


def seconds(text: str, mode: str) -> float:
    start = time.process_time()
    is_correct(text, "72", mode)
    return time.process_time() - start


def test_short_garbage_never_throws():
    rng = random.Random(1)
    pieces = [
        "answer is",
        "####",
        "\\boxed{",
        "\\frac{",
        "}",
        "{",
        "/",
        "0",
        "7",
        ",",
        ".",
        "-",
        "$",
        "^",
        "e",
        " ",
        "\n",
        ":00",
    ]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randrange(30)))
        answer = extract_answer(text)
        assert answer is None or canonical(Fraction(answer)) == answer
