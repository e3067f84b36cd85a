"""Linear layers over a copy of their weight in oneDNN's layout: in bfloat16 the same values, to the bit."""

import pytest
import torch
from conftest import VOCABULARY, tiny_system1
from torch import nn

from llm2.config import VerifierSpec
from llm2.decoding import model_runner
from llm2.decoding.decoder import Decoder
from llm2.decoding.linear import OneDNNLinear
from llm2.decoding.sampling import Guidance
from llm2.verifier.model import ProcessVerifier

PROMPTS = torch.randint(3, VOCABULARY, (5, 11), generator=torch.Generator().manual_seed(8)).tolist()
BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_bfloat16 = pytest.mark.skipif(not BFLOAT16, reason="oneDNN has no bfloat16 on this CPU")


@needs_bfloat16
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_in_bfloat16_is_equal_for_any_shape(bias):
    torch.manual_seed(0)
    layer = nn.Linear(192, 70, bias=bias, dtype=torch.bfloat16)
    copied = OneDNNLinear(layer)
    for shape in [(1, 192), (17, 192), (1, 33, 192), (1, 300, 192), (2, 3, 192), (0, 192), (1, 0, 192)]:
        states = torch.randn(*shape, dtype=torch.bfloat16)
        assert torch.equal(copied(states), layer(states)), shape


def test_what_it_takes():
    assert OneDNNLinear.takes(nn.Linear(4, 4))
    assert OneDNNLinear.takes(nn.Linear(4, 4, dtype=torch.bfloat16)) == BFLOAT16
    assert not OneDNNLinear.takes(nn.Linear(4, 4, dtype=torch.float16))
    assert not OneDNNLinear.takes(nn.Bilinear(4, 4, 4))
    watched = nn.Linear(4, 4)
    watched.register_forward_hook(lambda *_: None)
    assert not OneDNNLinear.takes(watched)


def copies(model: nn.Module) -> int:
    return sum(isinstance(layer, OneDNNLinear) for layer in model.modules())


@needs_bfloat16
@pytest.mark.parametrize("kind", [None, "full", "lora", "prefix"])
def test_decoding_in_bfloat16_writes_the_same_with_and_without_copies(kind, monkeypatch, tmp_path):
    system1, verifier = tiny_system1().bfloat16(), None
    if kind is not None:
        tiny_system1(1 if kind == "full" else 0).save_pretrained(tmp_path)
        torch.manual_seed(2)
        spec = VerifierSpec(kind=kind, **({"lora_r": 4} if kind == "lora" else {}))
        verifier = ProcessVerifier.from_system1(str(tmp_path), spec, attn_implementation="eager").eval().bfloat16()
    guidance = None if verifier is None else Guidance(verifier=verifier, alpha=0.02, beta=3.0)

    def written() -> tuple[list, int]:
        decoder = Decoder(system1, guidance)
        rows = decoder.decode(PROMPTS, max_new_tokens=20, eos=[1])
        return [row.token_ids for (row,) in rows], copies(decoder.state.lm.body)

    found, many = written()
    monkeypatch.setattr(model_runner, "MAX_COPIED_BYTES", 0)
    assert written() == (found, 0) and many > 0


def test_bodies_in_float32_are_left_alone():
    assert copies(Decoder(tiny_system1()).state.lm.body) == 0
