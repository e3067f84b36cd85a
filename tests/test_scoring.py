"""Scores of finished solutions: batched equals one by one, and a score depends on earlier tokens only."""

import pytest
import torch

from llm2.common.architecture import keeps_contexts
from llm2.config import VerifierSpec
from llm2.verifier import scoring
from llm2.verifier.model import ProcessVerifier
from llm2.verifier.scoring import _read, score_tokens, solution_score

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
SOLUTIONS = [[20, 21], [22, 23, 24, 25, 26], [27]]


def test_batched_scores_equal_those_of_each_text_alone(verifier):
    for scores, prompt, solution in zip(score_tokens(verifier, PROMPTS, SOLUTIONS), PROMPTS, SOLUTIONS, strict=True):
        with torch.inference_mode():
            alone = verifier(torch.tensor([prompt + solution])).scores[0, len(prompt) :]
        assert scores == pytest.approx(alone.tolist(), abs=1e-4)
    assert score_tokens(verifier, PROMPTS, SOLUTIONS, batch_size=1)[1] == pytest.approx(
        score_tokens(verifier, PROMPTS, SOLUTIONS)[1], abs=1e-4
    )


@pytest.mark.parametrize("kind", ["full", "prefix", "mlp"])
@pytest.mark.parametrize("batch_size", [3, 16])
def test_samples_of_a_prompt_that_is_read_once_are_scored_as_alone(kind, batch_size, system1_folder, monkeypatch):
    verifier = ProcessVerifier.from_system1(system1_folder, VerifierSpec(kind=kind)).eval()
    for weight in () if verifier.score is None else verifier.score.parameters():
        torch.nn.init.normal_(weight)
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[0], PROMPTS[2], PROMPTS[2], [30, 31]]
    solutions = [[20], [21, 22, 23], [24, 25, 26, 27], [28], [20, 20], [29, 30, 31]]
    read = []
    monkeypatch.setattr(scoring, "_read", lambda *arguments: read.append(len(arguments[1])) or _read(*arguments))
    found = score_tokens(verifier, prompts, solutions, batch_size)
    assert read == ([2, 1] if batch_size == 3 else [3])
    for scores, prompt, solution in zip(found, prompts, solutions, strict=True):
        expected = score_tokens(verifier, [prompt], [solution])[0]
        assert scores == pytest.approx(expected, abs=1e-4, rel=1e-4) and min(map(abs, scores)) > 1e-3


def test_a_prompt_is_read_with_each_text_where_positions_depend_on_the_length(verifier, monkeypatch):
    """Rope of type dynamic or longrope turns a prompt's keys otherwise in a longer text."""
    monkeypatch.setattr(scoring, "_read", None)
    for kind in ("dynamic", "longrope"):
        rope = {**verifier.backbone.config.rope_parameters, "rope_type": kind}
        monkeypatch.setattr(verifier.backbone.config, "rope_parameters", rope)
        assert not keeps_contexts(verifier.backbone)
        score_tokens(verifier, PROMPTS[:1] * 2, SOLUTIONS[:2])


def test_a_score_does_not_depend_on_what_follows(verifier):
    (scores,) = score_tokens(verifier, PROMPTS[:1], [[20, 21]])
    (longer,) = score_tokens(verifier, PROMPTS[:1], [[20, 21, 40, 41]])
    assert scores == pytest.approx(longer[: len(scores)], abs=1e-4)


def test_a_solution_is_ranked_by_its_mean_worst_or_last_score():
    assert [solution_score([1.0, -2.0, 4.0], how) for how in ("mean", "min", "last")] == [1.0, -2.0, 4.0]
