"""A results folder: what it holds, that it is resumed and never mixed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llm2.config import EvaluateConfig
from llm2.errors import UserError
from llm2.evaluation import evaluate
from llm2.generation import Guidance, decode
from llm2.models import load_system1, load_tokenizer
from llm2.verifier import ProcessVerifier, load_verifier

SYSTEM1 = "llm2/testbed/system1"
MODES = ("plain_greedy", "guided_greedy", "plain_sampling", "guided_sampling")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> str:
    """System 1 with a random head: an opinion, if not a good one."""
    folder = str(tmp_path_factory.mktemp("verifier"))
    torch.manual_seed(0)
    ProcessVerifier.from_system1(SYSTEM1).save_pretrained(folder)
    return folder


@pytest.fixture
def config(untrained, tmp_path) -> EvaluateConfig:
    return EvaluateConfig(
        model=SYSTEM1,
        verifier=untrained,
        output_dir=str(tmp_path / "results"),
        benchmark="testbed",
        modes=MODES,
        limit=5,
        beta=4.0,
        samples=4,
        majority_at=(1, 4),
        max_new_tokens=160,
        batch_size=8,
        device="cpu",
    )


def test_a_results_folder_explains_itself(config):
    metrics = evaluate(config)
    folder = Path(config.output_dir)
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert (folder / "config.yaml").is_file()
    assert set(metrics["modes"]) == set(MODES) and metrics["n"] == 5 and metrics["split"] == "test"
    assert {(p["metric"], p["a"]) for p in metrics["paired"]} == {
        ("accuracy", "plain_greedy"),
        ("majority@1", "plain_sampling"),
        ("majority@4", "plain_sampling"),
    }
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 20 == len({(line["id"], line["mode"]) for line in lines})
    for line in lines:
        assert len(line["samples"]) == (4 if line["mode"].endswith("sampling") else 1)
    right = [line["samples"][0]["correct"] for line in lines if line["mode"] == "plain_greedy"]
    assert metrics["modes"]["plain_greedy"]["accuracy"] == sum(right) / 5
    assert metrics["modes"]["plain_greedy"]["verifier_forwards_per_token"] == 0
    assert metrics["modes"]["guided_greedy"]["verifier_forwards_per_token"] > 0


def test_predictions_are_what_decode_writes(config):
    evaluate(replace(config, modes=("guided_greedy",), limit=2))
    lines = [json.loads(line) for line in Path(config.output_dir, "predictions.jsonl").read_text().splitlines()]
    cpu = torch.device("cpu")
    model, tokenizer = load_system1(SYSTEM1, cpu), load_tokenizer(SYSTEM1)
    guidance = Guidance(verifier=load_verifier(config.verifier, cpu, "auto", len(tokenizer)), alpha=0.1, beta=4.0)
    for line in lines:
        messages = [{"role": "user", "content": line["question"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        decoded = decode(model, [prompt], max_new_tokens=160, eos=[tokenizer.eos_token_id], guidance=guidance)
        assert line["samples"][0]["text"] == tokenizer.decode(decoded[0][0].tokens, skip_special_tokens=True)


def test_a_killed_run_goes_on_with_the_same_result(config, tmp_path):
    whole = evaluate(config)
    predictions = Path(config.output_dir, "predictions.jsonl").read_bytes()
    torn = replace(config, output_dir=str(tmp_path / "torn"), batch_size=3)
    evaluate(replace(torn, limit=3))
    path = Path(torn.output_dir, "predictions.jsonl")
    path.write_bytes(path.read_bytes()[:-30])
    assert evaluate(torn) == whole
    assert sorted(path.read_bytes().splitlines()) == sorted(predictions.splitlines())


def test_predictions_of_another_config_are_never_mixed_in(config):
    small = replace(config, modes=("plain_greedy",), limit=2)
    evaluate(small)
    with pytest.raises(UserError, match=r"another config: beta was 4.0 and now is 1.0"):
        evaluate(replace(small, beta=1.0))
    before = Path(config.output_dir, "predictions.jsonl").read_bytes()
    assert before.count(b"\n") == 2, "what was there is left as it was"
    evaluate(replace(small, beta=1.0, resume=False))


def test_what_one_field_alone_cannot_tell_is_told(config):
    with pytest.raises(UserError, match="guided modes need a verifier"):
        evaluate(replace(config, verifier=None))
    with pytest.raises(UserError, match="majority_at: found 9, expected at most samples=4"):
        evaluate(replace(config, majority_at=(9,)))
