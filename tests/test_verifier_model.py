"""The verifier is System 1's backbone and a head, and comes back from disk as it was."""

import pytest
import torch
from conftest import VOCABULARY, tiny_system1, tiny_verifier
from reference import score
from test_collate import examples, model_inputs
from transformers import AutoConfig, AutoModelForCausalLM

from llm2.config import VerifierSpec
from llm2.errors import UserError
from llm2.verifier.arguments import VerifierTrainingArguments, new_verifier, refuse_long_solutions
from llm2.verifier.collate import verifier_batch
from llm2.verifier.load import load_verifier
from llm2.verifier.model import ProcessVerifier

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
    """Bit for bit once both were read from a file: tensors that never were may be aligned differently in memory."""
    verifier.save_pretrained(tmp_path / "once")
    once = load_verifier(str(tmp_path / "once"), torch.device("cpu"), "auto", VOCABULARY)
    once.save_pretrained(tmp_path / "again")
    again = load_verifier(str(tmp_path / "again"), torch.device("cpu"), "auto", VOCABULARY)
    for (name, old), (_, new) in zip(verifier.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(old, new), name
    with torch.inference_mode():
        assert torch.equal(once(IDS).scores, again(IDS).scores)
        torch.testing.assert_close(again(IDS).scores, verifier(IDS).scores, atol=1e-6, rtol=0)


def test_resized_embeddings_are_kept(tmp_path):
    verifier = tiny_verifier(tmp_path / "system1")
    verifier.resize_token_embeddings(VOCABULARY + 3)
    verifier.save_pretrained(tmp_path / "verifier")
    again = load_verifier(str(tmp_path / "verifier"), torch.device("cpu"), "auto", VOCABULARY + 3)
    assert torch.equal(again.get_input_embeddings().weight, verifier.get_input_embeddings().weight)
    assert again.config.backbone_config.vocab_size == VOCABULARY + 3


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_tied_weights_stay_tied(kind, tmp_path):
    """The LM loss uses the input embedding where System 1 ties its output embedding to it; System 1's stay tied."""
    tiny_system1(tie_word_embeddings=True).save_pretrained(tmp_path / "system1")
    verifier = ProcessVerifier.from_system1(str(tmp_path / "system1"), VerifierSpec(kind=kind))
    verifier.save_pretrained(tmp_path / "verifier")
    system1 = AutoModelForCausalLM.from_pretrained(tmp_path / "system1")
    again = ProcessVerifier.from_pretrained(tmp_path / "verifier", system1=system1)
    assert system1.lm_head.weight is system1.model.embed_tokens.weight
    assert (again.get_input_embeddings().weight is system1.lm_head.weight) == (kind == "lora")
    lm_loss = again(IDS, targets=IDS.roll(-1, 1)).lm_loss
    expected = torch.nn.functional.cross_entropy(
        system1(IDS).logits.flatten(0, 1), IDS.roll(-1, 1).flatten(), reduction="sum"
    )
    torch.testing.assert_close(lm_loss[0], expected)


FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "phi3"]


def family_system1(family: str, folder) -> str:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, **sizes, pad_token_id=2, bos_token_id=0, eos_token_id=1
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_any_decoder_only_backbone_can_be_a_verifier(family, kind, tmp_path):
    verifier = ProcessVerifier.from_system1(
        family_system1(family, tmp_path / "system1"), VerifierSpec(kind=kind)
    ).eval()
    for name, parameter in verifier.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    verifier.save_pretrained(tmp_path / "verifier")
    reloaded = ProcessVerifier.from_pretrained(tmp_path / "verifier").eval()
    with torch.inference_mode():
        torch.testing.assert_close(reloaded(IDS).scores, verifier(IDS).scores, atol=1e-6, rtol=0)
        torch.testing.assert_close(reloaded.merge()(IDS).scores, verifier(IDS).scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_solutions_share_rows_in_any_backbone(family, tmp_path):
    verifier = ProcessVerifier.from_system1(family_system1(family, tmp_path)).eval()
    solutions = examples(4)
    packed = verifier_batch(solutions, capacity=10**6)
    with torch.inference_mode():
        margins = verifier(**model_inputs(packed)).margins[0].tolist()
    triplets = [(example.ids, triplet) for example in solutions for triplet in example.triplets]
    for pair_id, margin in zip(packed.pair_ids[0].tolist(), margins, strict=True):
        ids, (position, gold, negative) = triplets[pair_id]
        prefix = ids[:position]
        expected = score(verifier, [*prefix, gold]) - score(verifier, [*prefix, negative])
        assert margin == pytest.approx(expected, abs=1e-4)


def test_a_verifier_of_another_vocabulary_is_refused(verifier, tmp_path):
    verifier.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"embeds {VOCABULARY} tokens and System 1 has {VOCABULARY + 1}"):
        load_verifier(str(tmp_path), torch.device("cpu"), "auto", VOCABULARY + 1)


def test_a_missing_verifier_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="expected a folder with config.json"):
        load_verifier(str(tmp_path), torch.device("cpu"), "auto", VOCABULARY)


def test_a_solution_longer_than_window_or_positions_is_refused():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    mistral = AutoConfig.for_model("mistral", sliding_window=16, intermediate_size=32, num_key_value_heads=2, **sizes)
    with torch.device("meta"):
        windowed = AutoModelForCausalLM.from_config(mistral).model
        table = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_positions=20, **sizes)).transformer
    refuse_long_solutions(windowed, 16)
    with pytest.raises(UserError, match="sliding window of 16 tokens, shorter than the 17"):
        refuse_long_solutions(windowed, 17)
    refuse_long_solutions(table, 20)
    with pytest.raises(UserError, match=r"the longest solution .* 21 positions, .*gpt2\) has a table of 20"):
        refuse_long_solutions(table, 21)
    refuse_long_solutions(tiny_system1().model, 10**6)


def test_two_seeds_make_two_heads(tmp_path):
    assert not torch.equal(tiny_verifier(tmp_path, 1).score.weight, tiny_verifier(tmp_path, 2).score.weight)


@pytest.mark.parametrize("kind", ["bilinear", "prefix"])
def test_a_verifier_of_a_family_without_sdpa_is_begun_all_the_same(tmp_path, kind):
    """Gemma 2 caps attention's logits, which SDPA cannot."""
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **shape, **heads)).save_pretrained(tmp_path)
    arguments = VerifierTrainingArguments(str(tmp_path / "out"), kind=kind, report_to="none", use_cpu=True)
    verifier = new_verifier(str(tmp_path), arguments, torch.device("cpu"))
    assert verifier.backbone.config._attn_implementation == "eager"
