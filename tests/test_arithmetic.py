import json
import random
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llm2 import LLM2
from llm2.common.loading import load_tokenizer
from llm2.config import EvaluateConfig, ExploreConfig, Mode
from llm2.decoding.arithmetic import TAIL, Arithmetic, can_become, open_equation
from llm2.errors import UserError
from llm2.evaluation.evaluate import check, evaluate
from llm2.exploration.explore import explore

PROCESSOR = "llm2.decoding.arithmetic:Arithmetic"


@pytest.mark.parametrize(
    ("text", "result", "right"),
    [
        ("12 + 30 =", 42, ""),
        ("12 + 30 = 4", 42, " 4"),
        ("12 + 30 = 42. The answer is", None, None),
        ("12 + 30 = 42 ", None, None),
        ("12 + 30 = x", None, None),
        ("12 + 30 = \n", None, None),
        ("5 =", None, None),
        ("It costs 5. 3 + 4 * 2 =", 11, ""),
        ("apples, 3 + 4 =", 7, ""),
        ("so 5 x 3 =", 15, ""),
        ("5 × 3 ÷ 2 = 7", Fraction(15, 2), " 7"),
        ("(5 + 3) * 2 =", 16, ""),
        ("<<48/2=2", 24, "2"),
        ("$1,200 * 2 = $", 2400, "  "),
        ("3 - 8 = -", -5, " -"),
        ("0.1 + 0.2 =", Fraction(3, 10), ""),
        ("5 + 3 = 8 + 2 =", 10, ""),
        ("so 30 / 60 = 1/", Fraction(1, 2), " 1/"),
        ("7 / 2 = 3 1", Fraction(7, 2), " 3 1"),
        ("7 / 2 = 3.5 ", None, None),
        ("12 + 30\t=", 42, ""),
        ("Step 2: 12 + 30 =", 42, ""),
        ("Nina's half-sister has 12 + 30 =", 42, ""),
        ("He sold 5, then a total of 12 + 30 =", 42, ""),
        ("(so 12 + 30 =", 42, ""),
        ("He has 6 shells and Nina has 12 + 30 =", 42, ""),
        ("She has 6 times as many as 5 + 3 =", None, None),
        ("He has 6 more than the 5 + 3 =", None, None),
        # it is not sure what these compute
        *(
            (f"{before} 2 + 3 =", None, None)
            for before in (r"4 \cdot", r"4 \times", "4 ·", "2 ^", "10 %", "10 mod", "8 :")
        ),
        *((f"{before} 2 + 3 =", None, None) for before in ("5 times", "five times", "half of", "3 boxes of", "20% of")),
        *((f"{before} (2 + 3) =", None, None) for before in ("sqrt", "f", r"\log", "twice", "12 plus", "5 fois")),
        ("…2 + 3 =", None, None),
        ("…times 2 + 3 =", None, None),
        ("x + 3 =", None, None),
        ("2x + 3 =", None, None),
        ("a - 4 + 3 =", None, None),
        ("- 3 + 4 =", None, None),
        ("20% + 3 =", None, None),
        ("10:30 - 9 =", None, None),
        ("5 apples + 3 =", None, None),
        ("2 ** 3 =", None, None),
        ("9 // 2 =", None, None),
        ("5 3 =", None, None),
        ("7 / 0 =", None, None),
        ("007 + 1 =", None, None),
        ("(5 + 3 =", None, None),
        ("5 +\n3 =", None, None),
        ("(" * 300 + "1" + ")" * 300 + " + 1 =", None, None),
    ],
)
def test_an_equation_is_open_until_its_result_is_written(text, result, right):
    assert open_equation(text) == (None if result is None else (result, right))


@pytest.mark.parametrize(
    ("result", "right", "wrong"),
    [
        (
            42,
            [" ", " 4", "42", " 42.", " 42.0", " 42, so", " $42", " x", "\n"],
            ["5", " 43", " 4.", "4 ", " 42.5", "420", "-", "   "],
        ),
        (-5, ["-", " -5", "−5", "-5.0"], ["5", " -6", "-50"]),
        (1200, ["1", "1,", "1,2", "1200", "1,200", "1,200."], ["12,", "12,00", "1 ", "1,300"]),
        (
            Fraction("7.5"),
            ["7", "7.", "7.5", "7.50", "15", "15/", " 15/2", "15/2.", "7 ", "7 1/2", "7 1/2 so"],
            ["7. So", "7 so", "7.4", "8", "75", "7.51", "750%", "15 ", "15/20", "15/22", "15/3", "7 2/4", "7 1/3"],
        ),
        (
            Fraction(3, 4),
            ["0", "0.75", ".", ".7", ".75", "3", "3/4", "75", "75%", " 75 %", "75% of"],
            ["75 x", "7.5%", "75.1%", "76", ".8", "4/3", "0 3/4", "-75%"],
        ),
        (Fraction("1234.5"), ["1,", "1,234.", "1234.5"], ["1,234 ", "1,2345", "12,34.5"]),
        (Fraction("1234.5678"), ["1,234.5", "1,234.56", "1234.567", "1,234.5678"], ["1,234.57", "1,234.5,"]),
        (Fraction(10, 3), ["3", "3 ", "3.3", "3.33", "3.34", "4"], ["3.35", "3.2", "33"]),
        (Fraction(-1, 16), ["-0", "-0.0", "-0.06", "-0.0625", "-1/16", "-6.25%"], ["0", "-0.06 ", "-0.063", "-6.3%"]),
    ],
)
def test_only_a_result_of_many_decimals_may_be_rounded(result, right, wrong):
    result = Fraction(result)
    assert [text for text in right if not can_become(text, result)] == []
    assert [text for text in wrong if can_become(text, result)] == []


def bpe(pre_tokenizer, decoder) -> PreTrainedTokenizerFast:
    """Tokens of one digit and more, with and without a space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    words = [f"{number} " + f"{number % 7}.{number % 13} = " for number in range(1000)] + ["+ - * / % . , $ x\n"] * 3
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


TOKENIZERS = {
    "bytes": tiny_tokenizer,
    "testbed": lambda: load_tokenizer("testbed"),
    "byte-level": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
    "metaspace": lambda: bpe(pre_tokenizers.Metaspace(), decoders.Metaspace()),
}


@pytest.fixture(params=TOKENIZERS, scope="module")
def arithmetic(request) -> Arithmetic:
    return Arithmetic(TOKENIZERS[request.param]())


def random_equation(rng: random.Random) -> tuple[str, Fraction]:
    a, b, sign = rng.randint(0, 99), rng.randint(1, 99), rng.choice("+-*/")
    values = {"+": Fraction(a + b), "-": Fraction(a - b), "*": Fraction(a * b), "/": Fraction(a, b)}
    return f"{a} {sign} {b} =", values[sign]


def test_whatever_the_logits_no_false_result_is_written(arithmetic):
    tokenizer, rng, numbers = arithmetic.tokenizer, random.Random(0), 0
    generator = torch.Generator().manual_seed(0)
    numeric = torch.tensor([bool(re.fullmatch(r"\s?[\d.]+", text)) for text in arithmetic.texts])
    for _ in range(60):
        left, result = random_equation(rng)
        ids = torch.tensor([tokenizer.encode(left, add_special_tokens=False)])
        for _ in range(8):
            logits = arithmetic(ids, 3 * torch.randn(1, len(tokenizer), generator=generator) + 6 * numeric)
            ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=-1)
        written = tokenizer.decode(ids[0])[len(tokenizer.decode(tokenizer.encode(left, add_special_tokens=False))) :]
        is_whole = result.denominator == 1
        if not is_whole and (found := re.match(r" ?-?((?:\d+ )?\d+/\d+|[\d.]+ ?%)", written)):
            size = sum(Fraction(part) for part in found[1].replace("%", "").split())
            assert size / (100 if "%" in found[0] else 1) == abs(result), (left, written)
        elif not is_whole and re.fullmatch(r"[ \d/-]*", written):
            continue  # perhaps the beginning of a fraction
        elif found := re.match(r" ?(-?\d+(?:,\d{3})*)(\.\d+)?", written):
            value, places = Fraction(found[0].replace(",", "").strip()), len(found[2] or ".") - 1
            inexact = 10**4 % result.denominator != 0
            assert value == result or (inexact and abs(value - result) * 10**places < 1), (left, written)
            numbers += 1
    assert numbers >= 10


def test_no_true_result_is_forbidden(arithmetic):
    tokenizer, rng = arithmetic.tokenizer, random.Random(1)
    for _ in range(40):
        left, result = random_equation(rng)
        inexact = 10**4 % result.denominator != 0
        forms = [f"{float(result):.{places}f}" for places in ((0, 1, 2) if inexact else (4,))]
        ids = tokenizer.encode(f"{left} {rng.choice(forms)} .\n", add_special_tokens=False)
        for end in range(1, len(ids)):
            logits = arithmetic(torch.tensor([ids[:end]]), torch.zeros(1, len(tokenizer)))
            assert logits[0, ids[end]] == 0, tokenizer.decode(ids[: end + 1])


def test_rows_do_not_touch_one_another(arithmetic):
    tokenizer = arithmetic.tokenizer
    rows = [
        tokenizer.encode(text, add_special_tokens=False) for text in ("\n1 + 1 =", "\nx", "\n2 * 3 = 6 .", "\n9 - 2 =")
    ]
    width = max(map(len, rows))
    ids = torch.tensor([rows[1][:1] * (width - len(row)) + row for row in rows])
    logits = torch.randn(len(rows), len(tokenizer))
    together = arithmetic(ids, logits)
    for row in range(len(rows)):
        assert torch.equal(arithmetic(ids[row : row + 1], logits[row : row + 1])[0], together[row])
    assert torch.equal(together[1:3], logits[1:3])
    assert together[0].isinf().any()
    assert logits.isfinite().all()  # they are the caller's


@pytest.mark.parametrize("more", [-3, 5])
def test_a_model_may_have_more_logits_than_its_tokenizer_has_tokens_or_fewer(arithmetic, more):
    ids = torch.tensor([arithmetic.tokenizer.encode("12 + 30 =", add_special_tokens=False)])
    size = len(arithmetic.tokenizer)
    expected = arithmetic(ids, torch.zeros(1, size))[:, : size + more]
    found = arithmetic(ids, torch.zeros(1, size + more))
    assert torch.equal(found[:, :size], expected)
    assert (found[:, size:] == 0).all()


def test_transformers_and_llm2_generate_the_same():
    llm2 = LLM2.from_pretrained("testbed", device="cpu")
    question = [
        {"role": "user", "content": "Nina has 12 shells. Ben has half as many shells as Nina. How many have they?"}
    ]
    inputs = llm2.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    options = {"max_new_tokens": 40, "logits_processor": [Arithmetic(llm2.tokenizer)]}
    plain = llm2.system1.generate(**inputs, eos_token_id=llm2.eos, do_sample=False, **options)
    assert torch.equal(llm2.generate(**inputs, **options), plain)


def equations(text: str) -> list[bool]:
    """Whether each equation holds of which it is sure what is computed."""
    found = re.finditer(r"(?<= )((?:\d+ [-+*/] )+\d+) = (\d+)(?=\D)", text)
    sure = [each for each in found if "/" not in each[1] and open_equation(text[: each.start(2)])]
    return [eval(each[1]) == int(each[2]) for each in sure]


@pytest.mark.long
def test_no_mode_of_evaluation_writes_a_false_equation(tmp_path):
    config = EvaluateConfig(
        model="testbed",
        verifier="testbed-verifier",
        task="testbed",
        output_dir=str(tmp_path / "with"),
        logits_processor=PROCESSOR,
        modes=tuple(Mode),
        limit=6,
        num_samples=2,
        majority_at=(1,),
        search_solutions=3,
        temperature=2.0,
        max_new_tokens=60,
        score_samples=False,
        traced_samples=0,
        device="cpu",
    )
    metrics = evaluate(config)
    assert metrics["settings"]["logits_processor"] == PROCESSOR
    assert "arithmetic.py" in metrics["inputs"]["logits_processor"]
    sampled = {"modes": (Mode.PLAIN_SAMPLING,), "logits_processor": None}
    evaluate(replace(config, output_dir=str(tmp_path / "without"), **sampled))
    true = {}
    for folder in ("with", "without"):
        lines = [json.loads(line) for line in Path(tmp_path, folder, "predictions.jsonl").read_text().splitlines()]
        for mode in Mode:
            texts = [sample["text"] for line in lines if line["mode"] == mode for sample in line["samples"]]
            true[folder, mode] = [holds for text in texts for holds in equations(text)]
    for mode in Mode:
        assert len(true["with", mode]) > 5
        assert all(true["with", mode]), mode
    assert not all(true["without", Mode.PLAIN_SAMPLING])


class NoProcessor:
    pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_processor": "arithmetic"}, "found 'arithmetic', expected MODULE:CLASS"),
        ({"logits_processor": "nowhere:Arithmetic"}, "'nowhere:Arithmetic' cannot be imported"),
        ({"logits_processor": f"{__name__}:NoProcessor"}, "no subclass of transformers.LogitsProcessor"),
        (
            {"logits_processor": PROCESSOR, "engine": "vllm", "server": "http://127.0.0.1:1/v1"},
            "with engine vllm, expected engine llm2",
        ),
        (
            {"logits_processor": PROCESSOR, "engine": "vllm", "modes": (Mode.GUIDED_GREEDY,), "verifier": "none"},
            "with engine vllm, expected engine llm2",
        ),
    ],
)
def test_a_processor_that_cannot_act_is_refused_before_weights_load(tmp_path, change, message):
    fields = {"model": "none", "task": "testbed", "output_dir": str(tmp_path), "modes": (Mode.PLAIN_GREEDY,)}
    config = EvaluateConfig(**fields | change)
    with pytest.raises(UserError, match=re.escape(message)):
        check(config)


@pytest.mark.long
def test_exploration_goes_on_from_no_forbidden_token(tmp_path):
    config = ExploreConfig(
        model="testbed",
        task="testbed",
        output=str(tmp_path / "with.jsonl"),
        logits_processor=PROCESSOR,
        solutions="own",
        solution_samples=2,
        limit=12,
        max_new_tokens=60,
        max_rollouts=2,
        gold_rollouts=2,
        device="cpu",
    )
    explore(config)
    explore(replace(config, output=str(tmp_path / "without.jsonl"), logits_processor=None))
    tokenizer, forbidden = load_tokenizer("testbed"), {"with": 0, "without": 0}
    arithmetic = Arithmetic(tokenizer)
    for name in forbidden:
        for line in map(json.loads, (tmp_path / f"{name}.jsonl.pairs.jsonl").read_text().splitlines()):
            ids = tokenizer.apply_chat_template(line["messages"], return_dict=False)
            for position, *tokens in (pair["triplet"] for pair in line["pairs"]):
                allowed = arithmetic(torch.tensor([ids[:position]]), torch.zeros(1, len(tokenizer)))
                forbidden[name] += (allowed[0, tokens] < 0).any().item()
            assert name == "without" or all(equations(line["messages"][-1]["content"]))
    assert forbidden["with"] == 0
    assert forbidden["without"] > 0


def test_special_tokens_begin_a_text(arithmetic):
    tokenizer = arithmetic.tokenizer
    left = tokenizer.encode("12 + 30 =", add_special_tokens=False)
    alone = arithmetic(torch.tensor([left]), torch.zeros(1, len(tokenizer)))
    before = [*tokenizer.encode("\n7", add_special_tokens=False), tokenizer.eos_token_id]
    assert alone.isinf().any()
    assert torch.equal(arithmetic(torch.tensor([before + left]), torch.zeros(1, len(tokenizer))), alone)


def test_a_left_side_that_goes_further_back_than_is_read_is_not_judged(arithmetic):
    tokenizer = arithmetic.tokenizer
    for count, judged in ((3, True), (TAIL, False)):
        text = "\n" + " + ".join(["6"] * count) + " ="
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        assert (ids.shape[1] > TAIL) is not judged
        assert arithmetic(ids, torch.zeros(1, len(tokenizer))).isinf().any() == judged


def test_behind_a_false_result_nothing_is_forbidden(arithmetic):
    ids = torch.tensor([arithmetic.tokenizer.encode("\n2 + 2 = 5", add_special_tokens=False)])
    assert (arithmetic(ids, torch.zeros(1, len(arithmetic.tokenizer))) == 0).all()


def test_padding_is_no_text():
    llm2 = LLM2.from_pretrained("testbed", device="cpu")
    rows = ["12 + 30 = ", "3 + 4 = ", "Nina has 12 shells. Ben has half as many shells as Nina, and so on. 3 + 4 = "]
    options = {"max_new_tokens": 4, "logits_processor": [Arithmetic(llm2.tokenizer)]}
    inputs = llm2.tokenizer(rows, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    together = llm2.generate(**inputs, **options)[:, inputs.input_ids.shape[1] :]
    for row, text in zip(together, rows, strict=True):
        alone = llm2.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        expected = llm2.generate(**alone, **options)[0, alone.input_ids.shape[1] :]
        assert torch.equal(row[: len(expected)], expected)
