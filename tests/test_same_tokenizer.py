"""Tokenizers that write other tokens than System 1's are refused, whatever they differ in."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import tiny_verifier
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llm2 import LLM2
from llm2.common.loading import TESTBED, load_tokenizer
from llm2.common.same_tokenizer import difference
from llm2.config import EvaluateConfig, ExploreConfig
from llm2.errors import UserError
from llm2.evaluation.evaluate import Evaluator
from llm2.exploration.negatives import NegativeSampler
from llm2.tasks import load_task


def changed(change) -> PreTrainedTokenizerFast:
    """The testbed's tokenizer after `change`, which is given its backend and the JSON text of it."""
    tokenizer = load_tokenizer("testbed")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    change(content)
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **special)


def swap_merges(content):
    merges = content["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]


def cut_behind_spaces(content):
    content["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Split", "pattern": {"String": " "}})
    content["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "MergedWithPrevious", "invert": False}


def lowercase(content):
    content["normalizer"] = {"type": "Lowercase"}


def begin_with_a_space(content):
    content["normalizer"] = {"type": "Prepend", "prepend": " "}


def pad_and_truncate(content):
    content["truncation"] = {"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None}
    content["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": content["added_tokens"][0]["content"]}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda content: None, None),
        (pad_and_truncate, None),
        (swap_merges, "merge 0"),
        (cut_behind_spaces, "the tokens of "),
        (lowercase, "the tokens of "),
        (begin_with_a_space, "the tokens of "),
        (lambda content: content["model"]["vocab"].update(new=len(content["model"]["vocab"]) + 9), "token "),
    ],
)
def test_tokenizers_are_told_apart_by_what_decides_the_tokens(change, expected):
    found = difference(changed(change), load_tokenizer("testbed"))
    assert found is None if expected is None else found.startswith(expected)


@pytest.fixture
def other(tmp_path) -> str:
    """A copy of the testbed's System 1, whose tokenizer has other merges."""
    shutil.copytree(TESTBED, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    swap_merges(content)
    path.write_text(json.dumps(content))
    assert load_tokenizer(str(tmp_path / "other")).get_vocab() == load_tokenizer("testbed").get_vocab()
    return str(tmp_path / "other")


def test_a_verifier_and_a_contrast_model_with_another_tokenizer_are_refused(other, tmp_path):
    sentence = "expected System 1's tokenizer, found another one: they differ in merge 0"
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "verifier").mkdir(exist_ok=True)
        shutil.copy(Path(other, file), tmp_path / "verifier" / file)
    tiny_verifier(tmp_path / "system1", vocab_size=288).save_pretrained(tmp_path / "verifier")
    with pytest.raises(UserError, match=f"verifier .*: {sentence}"):
        LLM2.from_pretrained("testbed", tmp_path / "verifier", device="cpu")
    config = EvaluateConfig(model="testbed", contrast=other, output_dir=str(tmp_path), device="cpu", task="testbed")
    with pytest.raises(UserError, match=f"contrast .*: {sentence}"):
        Evaluator(config, load_tokenizer("testbed"), load_task("testbed"), ())
    config = ExploreConfig(
        model="testbed", output="x", task="testbed", device="cpu", negatives="contrast", contrast_model=other
    )
    with pytest.raises(UserError, match=f"contrast_model .*: {sentence}"):
        NegativeSampler(config, load_tokenizer("testbed"))
