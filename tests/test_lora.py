"""A LoRA verifier: System 1's own weights with an adapter and a head, saved and loaded without loss."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, tiny_system1, tiny_verifier
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from llm2.common.loading import load_language_model
from llm2.config import VerifierSpec
from llm2.decoding.decoder import Decoder
from llm2.decoding.sampling import Guidance
from llm2.errors import UserError
from llm2.verifier.load import load_verifier
from llm2.verifier.model import ProcessVerifier

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@torch.inference_mode()
def scores(verifier: ProcessVerifier) -> torch.Tensor:
    return verifier(IDS).scores


def lora_verifier(folder, **settings) -> ProcessVerifier:
    """Its B matrices are random too, as after training."""
    tiny_system1().save_pretrained(folder)
    torch.manual_seed(1)
    verifier = ProcessVerifier.from_system1(str(folder), VerifierSpec(kind="lora", lora_r=4, **settings)).eval()
    for name, parameter in verifier.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return verifier


@pytest.fixture
def verifier(tmp_path) -> ProcessVerifier:
    return lora_verifier(tmp_path / "system1")


@pytest.fixture
def folder(verifier, tmp_path) -> str:
    verifier.save_pretrained(tmp_path / "verifier")
    return str(tmp_path / "verifier")


def test_a_new_adapter_changes_no_score(tmp_path):
    tiny_system1().save_pretrained(tmp_path)
    verifier = ProcessVerifier.from_system1(str(tmp_path), VerifierSpec(kind="lora"))
    hidden = tiny_system1().model(IDS).last_hidden_state
    torch.testing.assert_close(scores(verifier), (hidden @ verifier.score.weight[0]).detach())
    assert verifier.config.lora == {"rank": 16, "alpha": 32.0, "dropout": 0.0, "targets": "all-linear"}


def test_only_the_adapter_and_the_head_are_trained(verifier):
    trained = {name for name, parameter in verifier.named_parameters() if parameter.requires_grad}
    assert "score.weight" in trained
    assert trained - {"score.weight"} == {name for name in verifier.state_dict() if ".lora_" in name}


def test_the_folder_holds_no_weight_of_system1(verifier, folder, tmp_path):
    names = sorted(path.name for path in (tmp_path / "verifier").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "config.json"]
    stored = load_file(tmp_path / "verifier" / "adapter_model.safetensors")
    assert all("lora_" in name or name == "base_model.model.score.weight" for name in stored)
    assert json.loads((tmp_path / "verifier" / "config.json").read_text())["lora"]["rank"] == 4


def test_loaded_saved_and_loaded_again_scores_are_bit_equal(verifier, folder, tmp_path):
    once = load_verifier(folder, CPU, "auto", VOCABULARY)
    once.save_pretrained(tmp_path / "again")
    again = load_verifier(str(tmp_path / "again"), CPU, "auto", VOCABULARY)
    assert torch.equal(scores(once), scores(again))
    torch.testing.assert_close(scores(once), scores(verifier), atol=1e-6, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(verifier.parameters(), again.parameters(), strict=True))


def test_a_lora_verifier_shares_the_weights_of_a_loaded_system1(folder, tmp_path):
    system1 = AutoModelForCausalLM.from_pretrained(tmp_path / "system1").eval()
    before = system1(IDS).logits
    verifier = load_verifier(folder, CPU, "auto", VOCABULARY, system1=system1)
    shared = {id(parameter) for parameter in system1.parameters()}
    for name, parameter in verifier.named_parameters():
        assert (id(parameter) in shared) == (".lora_" not in name and name != "score.weight"), name
    assert torch.equal(scores(verifier), scores(load_verifier(folder, CPU, "auto", VOCABULARY)))
    assert torch.equal(system1(IDS).logits, before), "System 1 itself has no adapter"
    assert not any("lora_" in name for name in system1.state_dict())


def test_merging_changes_no_score_and_leaves_system1_alone(folder, tmp_path):
    system1 = AutoModelForCausalLM.from_pretrained(tmp_path / "system1").eval()
    verifier = load_verifier(folder, CPU, "auto", VOCABULARY, system1=system1)
    expected, before = scores(verifier), system1(IDS).logits
    merged = verifier.merge()
    torch.testing.assert_close(scores(merged), expected, atol=1e-5, rtol=0)
    assert torch.equal(system1(IDS).logits, before)
    assert merged.config.lora is None and not any("lora_" in name for name in merged.state_dict())

    merged.save_pretrained(tmp_path / "merged")
    once = load_verifier(str(tmp_path / "merged"), CPU, "auto", VOCABULARY)
    once.save_pretrained(tmp_path / "again")
    again = load_verifier(str(tmp_path / "again"), CPU, "auto", VOCABULARY)
    assert torch.equal(scores(once), scores(again))
    torch.testing.assert_close(scores(once), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_is_merged_in_float32_and_rounded_once(verifier, folder, tmp_path, dtype):
    system1 = AutoModelForCausalLM.from_pretrained(tmp_path / "system1", dtype=dtype).eval()
    before = {name: weight.clone() for name, weight in system1.state_dict().items()}
    merged = load_verifier(folder, CPU, "auto", VOCABULARY, system1=system1).merge()
    assert merged.dtype == dtype and not any("lora_" in name for name in merged.state_dict())
    weights, layers = merged.backbone.state_dict(), 0
    for name, layer in verifier.backbone.named_modules():
        if isinstance(layer, LoraLayer):
            up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            exact = layer.get_base_layer().weight.to(dtype).float() + layer.scaling["default"] * (up @ down)
            assert torch.equal(weights[f"{name}.weight"], exact.to(dtype)), name
            layers += 1
    assert layers == 14
    assert all(torch.equal(weight, before[name]) for name, weight in system1.state_dict().items()), "shared, unchanged"


def test_an_adapter_that_rounding_would_swallow_is_not_merged(verifier, tmp_path):
    with torch.no_grad():
        for name, weight in verifier.named_parameters():
            if "lora_B" in name:
                weight.mul_(1e-4)
    verifier.save_pretrained(tmp_path / "small")
    load_verifier(str(tmp_path / "small"), CPU, "float32", VOCABULARY).merge()
    with pytest.raises(UserError, match="merged in torch.bfloat16, the adapter loses 9.% of what it adds"):
        load_verifier(str(tmp_path / "small"), CPU, "bfloat16", VOCABULARY).merge()


@pytest.mark.one_in(2)
@torch.inference_mode()
@pytest.mark.parametrize("shared", [True, False])
def test_a_lora_verifier_guides_in_bfloat16(folder, tmp_path, shared):
    system1 = AutoModelForCausalLM.from_pretrained(tmp_path / "system1", dtype=torch.bfloat16).eval()
    verifier = load_verifier(folder, CPU, "auto", VOCABULARY, system1=system1)
    guidance = Guidance(verifier=verifier, alpha=0.02, beta=3.0, shared=shared)
    ((completion,),) = Decoder(system1, guidance).decode([[5, 6, 7]], max_new_tokens=6, eos=[], trace=True)
    ids, exact = [5, 6, 7], load_verifier(folder, CPU, "float32", VOCABULARY)
    for choice in completion.trace:
        if choice.scores is not None:
            expected = [exact(torch.tensor([[*ids, token]])).scores[0, -1].item() for token in choice.candidates]
            assert choice.scores == pytest.approx(expected, abs=0.3)
        ids.append(choice.candidates[choice.chosen])
    assert any(choice.scores for choice in completion.trace)


def test_adapters_of_earlier_versions_load(verifier, folder, tmp_path):
    """Written by hand: the keys of the tensors and the settings in config.json are what folders on disk hold."""
    adapter = {
        "base_model.model." + name.removeprefix("backbone.").replace(".default.", "."): torch.randn_like(tensor)
        for name, tensor in verifier.state_dict().items()
        if ".lora_" in name or name == "score.weight"
    }
    assert "base_model.model.layers.0.self_attn.q_proj.lora_A.weight" in adapter and len(adapter) == 1 + 2 * 2 * 7
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    save_file(adapter, earlier / "adapter_model.safetensors")
    config = json.loads(Path(folder, "config.json").read_text())
    config["lora"] = {"rank": 4, "alpha": 32.0, "dropout": 0.0, "targets": "all-linear"}
    (earlier / "config.json").write_text(json.dumps(config))
    load_verifier(str(earlier), CPU, "auto", VOCABULARY).save_pretrained(tmp_path / "now")
    stored = load_file(tmp_path / "now" / "adapter_model.safetensors")
    assert stored.keys() == adapter.keys() and all(torch.equal(stored[key], adapter[key]) for key in adapter)


def test_an_adapter_without_one_of_its_weights_is_refused(folder):
    path = Path(folder, "adapter_model.safetensors")
    adapter = load_file(path)
    del adapter["base_model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(adapter, path)
    with pytest.raises(UserError, match=r"up_proj.lora_B.weight': found no such weight, expected \(64, 4\)"):
        load_verifier(folder, CPU, "auto", VOCABULARY)


def test_chosen_targets_are_adapted_and_unknown_ones_refused(tmp_path):
    verifier = lora_verifier(tmp_path, lora_target_modules=("q_proj", "v_proj"))
    adapted = {name.split(".lora_")[0].split(".")[-1] for name in verifier.state_dict() if ".lora_" in name}
    assert adapted == {"q_proj", "v_proj"}
    with pytest.raises(UserError, match="LoRA targets .* do not fit the backbone"):
        lora_verifier(tmp_path, lora_target_modules=("nothing_proj",))


def forget_weights(folder):
    """As earlier versions wrote it."""
    config = Path(folder, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"system1_fingerprint": None}))


@pytest.mark.parametrize("changes", [{"hidden_size": 48}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}])
def test_an_adapter_of_an_earlier_version_and_another_system1_is_refused(folder, changes):
    forget_weights(folder)
    with pytest.raises(UserError, match="the adapter was not made from this System 1"):
        load_verifier(folder, CPU, "auto", VOCABULARY, system1=tiny_system1(**changes))


def test_an_adapter_of_another_system1_is_refused(folder):
    with pytest.raises(UserError, match="it was trained on the states of .*, found another System 1"):
        load_verifier(folder, CPU, "auto", VOCABULARY, system1=tiny_system1(seed=3))
    load_verifier(folder, CPU, "auto", VOCABULARY, system1=tiny_system1().to(torch.bfloat16))
    forget_weights(folder)
    load_verifier(folder, CPU, "auto", VOCABULARY, system1=tiny_system1(seed=3))


def test_a_missing_base_model_is_refused_in_one_sentence(folder, tmp_path):
    shutil.rmtree(tmp_path / "system1")
    with pytest.raises(UserError, match="verifier .*: model .*system1': expected a folder"):
        load_verifier(folder, CPU, "auto", VOCABULARY)


def test_peft_itself_reads_the_adapter(verifier, folder, tmp_path):
    backbone = AutoModel.from_pretrained(tmp_path / "system1")
    theirs = PeftModel.from_pretrained(backbone, folder).eval()
    with torch.inference_mode():
        expected = verifier.backbone(IDS).last_hidden_state
        torch.testing.assert_close(theirs(IDS).last_hidden_state, expected, atol=1e-5, rtol=0)


def test_a_verifier_takes_system1s_dtype_unless_another_is_named(tmp_path):
    tiny_verifier(tmp_path / "system1").save_pretrained(tmp_path / "verifier")
    system1 = tiny_system1().to(torch.bfloat16)
    folder = str(tmp_path / "verifier")
    assert load_verifier(folder, CPU, "auto", VOCABULARY, system1).dtype == torch.bfloat16
    assert load_verifier(folder, CPU, "float32", VOCABULARY, system1).dtype == torch.float32


def decoded(system1, verifier, **options) -> list[int]:
    guidance = None if verifier is None else Guidance(verifier=verifier, alpha=0.02, **options)
    return Decoder(system1, guidance).decode([[5, 6, 7, 8]], max_new_tokens=12, eos=[])[0][0].token_ids


def test_threads_do_not_touch_one_another(folder, tmp_path):
    system1 = AutoModelForCausalLM.from_pretrained(tmp_path / "system1")
    decoder = Decoder(system1, Guidance(verifier=load_verifier(folder, CPU, "auto", VOCABULARY, system1), alpha=0.02))

    def text(number: int) -> list[int]:
        return decoder.decode([[5 + number, 6, 7, 8]], max_new_tokens=20, eos=[])[0][0].token_ids

    expected = [text(number) for number in range(12)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(text, range(12))) == expected


def test_a_verifier_in_memory_must_be_of_this_system1(folder, tmp_path):
    system1 = AutoModelForCausalLM.from_pretrained(tmp_path / "system1")
    verifier = ProcessVerifier.from_pretrained(folder)
    assert decoded(system1, verifier, beta=0.0) == decoded(system1, None)
    with pytest.raises(UserError, match="it is made for the weights of another System 1"):
        decoded(tiny_system1(seed=3), verifier)
    with pytest.raises(UserError, match="expected System 1's torch.bfloat16, or shared=False"):
        decoded(AutoModelForCausalLM.from_pretrained(tmp_path / "system1", dtype=torch.bfloat16), verifier)
    with pytest.raises(UserError, match=f"found {VOCABULARY:,} tokens, System 1 has {VOCABULARY + 8:,}"):
        decoded(tiny_system1(vocab_size=VOCABULARY + 8), verifier)


def test_an_adapter_in_system1s_own_layers_is_shared_or_refused(tmp_path):
    plain, system1 = tiny_system1(), tiny_system1()
    verifier = ProcessVerifier.from_language_model(system1, "system1", VerifierSpec(kind="lora", lora_r=4)).eval()
    for name, parameter in verifier.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(verifier.score.weight)
    assert decoded(system1, verifier, beta=0.0) == decoded(plain, None)
    with pytest.raises(UserError, match="the verifier's adapter lies in System 1's own layers"):
        decoded(system1, verifier, shared=False)


def test_scores_by_system1s_output_embedding_are_refused_with_another_one(tmp_path):
    system1 = tiny_system1()
    system1.save_pretrained(tmp_path / "system1")
    spec = VerifierSpec(kind="prefix_lora", lora_r=4)
    ProcessVerifier.from_system1(str(tmp_path / "system1"), spec).save_pretrained(tmp_path / "verifier")

    def load(system1, folder="verifier"):
        return load_verifier(str(tmp_path / folder), CPU, "auto", VOCABULARY, system1=system1)

    half = load_language_model(str(tmp_path / "system1"), dtype=torch.float16)
    load(half).save_pretrained(tmp_path / "again")
    for known in (system1, tiny_system1().to(torch.bfloat16)):
        load(known), load(known, "again")
    system1.lm_head.weight.data.neg_()  # as experiments' finetune does with output_rank
    with pytest.raises(UserError, match="it was trained on the states of .*, found another System 1"):
        load(system1)
    in_memory = ProcessVerifier.from_pretrained(tmp_path / "verifier")
    with pytest.raises(UserError, match="it is made for the weights of another System 1"):
        decoded(system1, in_memory)
    config = tmp_path / "verifier" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"output_fingerprint": None}))
    load(system1)  # as earlier versions wrote it
