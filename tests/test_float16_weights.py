"""float16_weights: float32 products with float16 copies of the weights of linear layers."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, tiny_system1
from reference import decode_one
from torch import nn

from llm2 import LLM2
from llm2.config import EvaluateConfig, ExploreConfig, Mode, VerifierSpec
from llm2.decoding import linear
from llm2.decoding.decoder import Decoder
from llm2.decoding.linear import Float16Linear, use_float16_weights
from llm2.decoding.sampling import Guidance
from llm2.errors import UserError
from llm2.evaluation.evaluate import check, evaluate
from llm2.exploration.engines import check_engine
from llm2.verifier.model import ProcessVerifier

EOS = [1]
PROMPTS = torch.randint(3, VOCABULARY, (5, 11), generator=torch.Generator().manual_seed(8)).tolist()
needs_fbgemm = pytest.mark.skipif(
    torch.backends.quantized.engine not in linear.FBGEMM, reason="torch has no FBGEMM for this processor"
)


def rounded(model: nn.Module) -> nn.Module:
    """The slow twin: float32 linear layers whose weights float16 has rounded; an adapter's stay."""
    twin = copy.deepcopy(model)
    for name, layer in twin.named_modules():
        if isinstance(layer, nn.Linear) and "lora_" not in name:
            layer.weight = nn.Parameter(layer.weight.detach().half().float())
    return twin


def verifier_of(kind: str, folder) -> ProcessVerifier | None:
    if kind == "plain":
        return None
    tiny_system1(1 if kind == "separate" else 0).save_pretrained(folder)
    torch.manual_seed(2)
    spec = VerifierSpec() if kind == "separate" else VerifierSpec(kind="lora", lora_r=4)
    verifier = ProcessVerifier.from_system1(str(folder), spec, attn_implementation="eager").eval()
    for name, parameter in verifier.named_parameters():
        if "lora_B" in name or name == "score.weight":
            torch.nn.init.normal_(parameter, std=0.3)
    return verifier


@needs_fbgemm
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_equals_one_with_rounded_weights_for_any_shape(bias):
    torch.manual_seed(0)
    layer = nn.Linear(33, 70, bias=bias)
    twin = rounded(nn.Sequential(layer))
    for shape in [(1, 33), (5, 33), (2, 3, 33), (0, 33)]:
        states = torch.randn(shape)
        torch.testing.assert_close(Float16Linear(layer)(states), twin(states), rtol=1e-5, atol=1e-5)
    strided = torch.randn(33, 9).T
    torch.testing.assert_close(Float16Linear(layer)(strided), twin(strided), rtol=1e-5, atol=1e-5)
    assert not torch.equal(twin[0].weight, layer.weight), "nothing was rounded"


@needs_fbgemm
@pytest.mark.parametrize("kind", ["plain", "separate", "shared", "adapter"])
def test_the_decoder_writes_what_the_reference_writes_with_rounded_weights(kind, tmp_path):
    system1, verifier, batch = tiny_system1(), verifier_of(kind, tmp_path), [PROMPTS[i][: 2 * i + 1] for i in range(5)]
    twin, twin_verifier = rounded(system1), None if verifier is None else copy.deepcopy(verifier)
    if verifier is not None:
        twin_verifier.backbone = rounded(verifier.backbone)
    settings = {"verifier": twin_verifier, "alpha": 0.02, "beta": 3.0}
    expected = [decode_one(twin, prompt, max_new_tokens=12, eos=EOS, **settings) for prompt in batch]

    guidance = None if verifier is None else Guidance(verifier=verifier, alpha=0.02, beta=3.0, shared=kind == "shared")
    before = {name: tensor.clone() for name, tensor in system1.state_dict().items()}
    decoder = Decoder(system1, guidance, float16_weights=True)
    runners = {decoder.state.lm, decoder.state.verifier} - {None}
    for module in [*(runner.body for runner in runners), decoder.state.lm.head]:
        assert any(isinstance(layer, Float16Linear) for layer in module.modules())
    for _ in range(2):
        completions = decoder.decode(batch, max_new_tokens=12, eos=EOS)
        assert [completion.token_ids for (completion,) in completions] == expected
    assert all(torch.equal(before[name], tensor) for name, tensor in system1.state_dict().items())
    assert not any(isinstance(layer, Float16Linear) for layer in system1.modules())


@needs_fbgemm
def test_a_second_language_model_has_them_too():
    def completions(system1, other, **how):
        decoder = Decoder(system1, Guidance(verifier=other, alpha=0.02, beta=1.0), **how)
        return [row.token_ids for (row,) in decoder.decode(PROMPTS, max_new_tokens=12, eos=EOS)]

    system1, other = tiny_system1(), tiny_system1(3)
    assert completions(system1, other, float16_weights=True) == completions(rounded(system1), rounded(other))


def train(what: str, system1, verifier) -> None:
    """In place, by a fused optimizer, as transformers' Trainer takes: it leaves no trace in `_version`."""
    parameter = {
        "system1": lambda: system1.lm_head.weight,
        "separate": lambda: verifier.backbone.layers[1].mlp.down_proj.weight,
        "shared": lambda: next(p for name, p in verifier.named_parameters() if "lora_B" in name),
        "contrast": lambda: verifier.lm_head.weight,
    }[what]()
    parameter.grad = torch.sign(parameter.detach())
    torch.optim.SGD([parameter], lr=2.0, fused=True).step()


@pytest.mark.parametrize("float16_weights", [False, pytest.param(True, marks=needs_fbgemm)])
@pytest.mark.parametrize("what", ["system1", "separate", "shared", "contrast"])
def test_copies_of_weights_are_made_anew_after_training(float16_weights, what, tokenizer, tmp_path):
    """Without float16 weights only output layers and the adapters of shared forwards are copies."""
    system1 = tiny_system1()
    verifier = tiny_system1(3) if what == "contrast" else verifier_of(what.replace("system1", "separate"), tmp_path)
    llm2 = LLM2(system1, tokenizer, verifier, float16_weights=float16_weights, alpha=0.02, beta=3.0)
    options = {"inputs": torch.tensor([PROMPTS[0]]), "max_new_tokens": 8}
    decoder = Decoder(system1, llm2.guidance, float16_weights=float16_weights)
    before = llm2.generate(**options)
    train(what, system1, verifier)
    fresh = LLM2(system1, tokenizer, verifier, float16_weights=float16_weights, alpha=0.02, beta=3.0)
    after = llm2.generate(**options)
    assert torch.equal(after, fresh.generate(**options)) and not torch.equal(after, before)
    if float16_weights or what != "separate":
        with pytest.raises(UserError, match="trained after the Decoder was made"):
            decoder.decode([PROMPTS[0]], max_new_tokens=8, eos=EOS)


@needs_fbgemm
def test_evaluation_and_from_pretrained_take_the_key_and_results_record_it(tmp_path):
    options = {"task": "testbed", "limit": 4, "modes": (Mode.PLAIN_GREEDY,), "max_new_tokens": 40, "device": "cpu"}
    config = EvaluateConfig(model="testbed", output_dir=str(tmp_path / "results"), float16_weights=True, **options)
    evaluate(config)
    assert "float16_weights: true" in Path(config.output_dir, "config.yaml").read_text()
    lines = [json.loads(line) for line in Path(config.output_dir, "predictions.jsonl").read_text().splitlines()]
    llm2 = LLM2.from_pretrained("testbed", float16_weights=True, device="cpu")
    question = lines[0]["question"]
    assert llm2.chat(question, max_new_tokens=40).strip() == lines[0]["samples"][0]["text"].strip()
    assert isinstance(llm2.guided_generate.decoder.state.lm.head.lm_head, Float16Linear)
    with pytest.raises(UserError, match="float16_weights"):
        evaluate(replace(config, float16_weights=False))  # another config's results are not continued


@needs_fbgemm
@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dtype": "bfloat16"}, "dtype bfloat16, expected float32"), ({"engine": "vllm", "top_k": 5}, "expected engine")],
)
def test_what_cannot_have_them_is_refused_before_weights_load(tmp_path, changes, message):
    options = {"model": "nothing-here", "task": "testbed", "device": "cpu", "float16_weights": True, **changes}
    with pytest.raises(UserError, match=f"float16_weights.*{message}"):
        check(EvaluateConfig(output_dir=str(tmp_path), modes=(Mode.PLAIN_GREEDY,), **options))
    with pytest.raises(UserError, match=f"float16_weights.*{message}"):
        check_engine(ExploreConfig(output=str(tmp_path / "out.jsonl"), **options))


def test_a_torch_without_fbgemm_is_named(monkeypatch):
    monkeypatch.setattr(linear, "FBGEMM", ())
    with pytest.raises(UserError, match="quantized engine is .*, expected x86 or fbgemm"):
        LLM2.from_pretrained("nothing-here", float16_weights=True, device="cpu")


def test_what_is_no_bool_is_refused():
    """`float16_weights=no` in lm_eval's --model_args is a text."""
    with pytest.raises(UserError, match="float16_weights: found 'no', expected true or false"):
        LLM2.from_pretrained("nothing-here", float16_weights="no", device="cpu")


@needs_fbgemm
@pytest.mark.parametrize(("weight", "found"), [(-1e5, "1e\\+05"), (float("nan"), "nan"), (float("inf"), "inf")])
def test_a_weight_that_float16_cannot_hold_is_named(weight, found):
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[1, 2] = weight
    with pytest.raises(UserError, match=f"0 has a weight of {found}, expected at most 65,504"):
        use_float16_weights(model)
