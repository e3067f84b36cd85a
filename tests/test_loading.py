"""Models by name: `testbed` is the embedded System 1 wherever the process runs; others are refused in one sentence."""

import pytest
import torch

from llm2.common.loading import (
    TESTBED,
    eos_ids,
    eos_ids_by_name,
    is_local,
    load_backbone,
    load_system1,
    load_tokenizer,
    require_model,
)
from llm2.errors import UserError
from llm2.verifier.model import ProcessVerifier


def test_testbed_names_the_embedded_system1_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_local("testbed") and TESTBED.is_dir()
    require_model("testbed")
    tokenizer, system1 = load_tokenizer("testbed"), load_system1("testbed", torch.device("cpu"))
    assert tokenizer.name_or_path == system1.name_or_path == str(TESTBED)
    assert eos_ids_by_name("testbed", tokenizer) == eos_ids(system1, tokenizer) == [tokenizer.eos_token_id]
    for backbone in (load_backbone("testbed"), ProcessVerifier.from_system1("testbed").backbone):
        for name, weight in system1.model.state_dict().items():
            assert torch.equal(backbone.state_dict()[name], weight), name


@pytest.mark.parametrize("load", [require_model, load_tokenizer, load_backbone, ProcessVerifier.from_system1])
def test_a_missing_folder_is_refused_in_one_sentence(load):
    with pytest.raises(UserError, match="'./nowhere': expected a folder with config.json, found none") as refusal:
        load("./nowhere")
    assert "\n" not in str(refusal.value)
