"""The verifier is System 1's backbone and a head, and comes back from disk as it was."""

import pytest
import torch
from conftest import VOCABULARY, tiny_system1, tiny_verifier
from transformers import AutoConfig, AutoModelForCausalLM

from llm2.errors import UserError
from llm2.verifier import ProcessVerifier, load_verifier, refuse_sliding_window

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def test_scores_are_the_head_on_system1s_hidden_states(system1, tmp_path):
    system1.save_pretrained(tmp_path)
    verifier = ProcessVerifier.from_system1(str(tmp_path)).eval()
    with torch.inference_mode():
        hidden = system1.model(IDS).last_hidden_state
        expected = hidden @ verifier.score.weight[0]
        torch.testing.assert_close(verifier(IDS).scores, expected)
    assert verifier.score.bias is None and verifier.score.weight.abs().sum() > 0


def test_saved_and_reloaded_scores_are_the_same(verifier, tmp_path):
    verifier.save_pretrained(tmp_path)
    reloaded = load_verifier(str(tmp_path), torch.device("cpu"), "auto", VOCABULARY)
    for (name, old), (_, new) in zip(verifier.state_dict().items(), reloaded.state_dict().items(), strict=True):
        assert torch.equal(old, new), name
    with torch.inference_mode():
        torch.testing.assert_close(reloaded(IDS).scores, verifier(IDS).scores, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "phi3"])
def test_any_decoder_only_backbone_serves(family, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, **sizes, pad_token_id=2, bos_token_id=0, eos_token_id=1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "system1")
    verifier = ProcessVerifier.from_system1(str(tmp_path / "system1")).eval()
    verifier.save_pretrained(tmp_path / "verifier")
    reloaded = ProcessVerifier.from_pretrained(tmp_path / "verifier").eval()
    with torch.inference_mode():
        torch.testing.assert_close(reloaded(IDS).scores, verifier(IDS).scores, atol=1e-6, rtol=0)


def test_a_verifier_of_another_vocabulary_is_refused(verifier, tmp_path):
    verifier.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"knows {VOCABULARY} tokens and System 1 {VOCABULARY + 1}"):
        load_verifier(str(tmp_path), torch.device("cpu"), "auto", VOCABULARY + 1)


def test_a_missing_verifier_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="expected a folder with config.json"):
        load_verifier(str(tmp_path), torch.device("cpu"), "auto", VOCABULARY)


def test_a_sliding_window_shorter_than_the_text_is_refused():
    config = AutoConfig.for_model("mistral", sliding_window=16)
    refuse_sliding_window(config, 16)
    with pytest.raises(UserError, match="sliding window of 16 tokens and 17"):
        refuse_sliding_window(config, 17)
    refuse_sliding_window(tiny_system1().config, 10**6)


def test_two_seeds_make_two_heads(tmp_path):
    assert not torch.equal(tiny_verifier(tmp_path, 1).score.weight, tiny_verifier(tmp_path, 2).score.weight)
