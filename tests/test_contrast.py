"""Contrastive guidance in the decoder, against a loop without caches or batches."""

import pytest
import torch
from conftest import tiny_system1
from reference import decode_one

from llm2.config import EvaluateConfig, GuidanceConfig, Mode
from llm2.decoding.decoder import Decoder
from llm2.decoding.sampling import Guidance, SamplingParams
from llm2.errors import UserError
from llm2.evaluation.evaluate import check, evaluate

PROMPTS = [[5, 6, 7], [9, 8], [5, 6, 20, 21], [11, 12, 13, 14, 15], [30]]
EOS = [1, 25, 38]  # several, so that rows end at different times and others move into their slots


@pytest.fixture(scope="module")
def other():
    return tiny_system1(7)


def slow_greedy(system1, other, prompt, guidance) -> list[int]:
    def scored(ids, tokens, logits):
        return (other(torch.tensor([ids])).logits[0, -1] - logits)[tokens].tolist()

    return decode_one(system1, prompt, max_new_tokens=12, eos=EOS, scored=scored, **guidance.guidance_kwargs())


def decode(system1, other, guidance, batch_size=2, **options):
    options = {"max_new_tokens": 12, "eos": EOS, "batch_size": batch_size, **options}
    decoder = Decoder(system1, Guidance(verifier=other, **guidance.guidance_kwargs()))
    return [[row.token_ids for row in rows] for rows in decoder.decode(PROMPTS, **options)]


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_contrastive_greedy_decoding_equals_the_loop_without_caches(system1, other, beta):
    guidance = GuidanceConfig(alpha=0.05, beta=beta)
    expected = [[slow_greedy(system1, other, prompt, guidance)] for prompt in PROMPTS]
    assert decode(system1, other, guidance) == expected
    assert len({len(row) for (row,) in expected}) > 1  # rows did leave before others


def test_beta_0_is_system1_and_beta_1_on_the_whole_vocabulary_the_other_model(system1, other):
    def greedy(model):
        return [[row.token_ids for row in rows] for rows in Decoder(model).decode(PROMPTS, max_new_tokens=12, eos=EOS)]

    assert decode(system1, other, GuidanceConfig(alpha=0.1, beta=0.0)) == greedy(system1)
    assert decode(system1, other, GuidanceConfig(alpha=0.0, beta=1.0)) == greedy(other) != greedy(system1)


def test_a_contrastive_sample_depends_on_its_prompt_and_seed_alone(system1, other):
    options = {"sampling": SamplingParams(), "seeds": [[1, 2, 3]] * len(PROMPTS)}
    batches = [decode(system1, other, GuidanceConfig(alpha=0.05, beta=0.5), size, **options) for size in (1, 4, 64)]
    assert batches[0] == batches[1] == batches[2]


def test_an_evaluation_takes_a_second_model_in_the_verifiers_place(system1_folder, tmp_path):
    config = EvaluateConfig(
        model=system1_folder,
        contrast=system1_folder,
        task="testbed",
        split="validation",
        output_dir=str(tmp_path / "results"),
        limit=3,
        max_new_tokens=6,
        device="cpu",
    )
    metrics = evaluate(config)
    assert metrics["settings"]["contrast"] == system1_folder
    plain, guided = (metrics["modes"][mode] for mode in (Mode.PLAIN_GREEDY, Mode.GUIDED_GREEDY))
    assert plain["tokens_per_problem"] == guided["tokens_per_problem"]  # the same model twice changes nothing
    assert plain["verifier_forwards_per_token"] == 0 < guided["verifier_forwards_per_token"] <= 1
    assert guided["verifier_tokens_per_token"] > 1 - 1 / 6 > plain["verifier_tokens_per_token"] == 0  # and the prompt


def test_a_verifier_and_a_second_model_together_are_refused():
    with pytest.raises(UserError, match="contrast: found 'b' beside a verifier, expected one of the two"):
        check(EvaluateConfig(model="m", verifier="a", contrast="b", task="testbed", output_dir="o"))
