"""The kinds of a verifier: one key names each, earlier versions' keys and files name them too, and none takes another's
keys."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from test_train import config  # noqa: F401 (a fixture)

from llm2.common.config_file import load_config
from llm2.common.kinds import KINDS
from llm2.config import TrainConfig, VerifierSpec
from llm2.errors import UserError
from llm2.verifier.checkpoints import BEGUN, require_own
from llm2.verifier.load import load_verifier
from llm2.verifier.model import ProcessVerifier, ProcessVerifierConfig
from llm2.verifier.train import train

RUN = {"model": "testbed", "train_file": "t.jsonl", "output_dir": "o"}
# As earlier versions named each kind: keys of `train`, and keys of config.json.
OFF = {"score": "candidate", "prefix_head": None, "prefix_head_size": 8, "lora_r": None, "token_weight": False}
PREFIX = {**OFF, "score": "prefix"}
EARLIER = {
    "full": OFF,
    "lora": {**OFF, "lora_r": 8},
    "prefix": PREFIX,
    "prefix_lora": {**PREFIX, "lora_r": 8, "token_weight": True},
    "bilinear": {**PREFIX, "prefix_head": "bilinear"},
    "mlp": {**PREFIX, "prefix_head": "mlp", "prefix_head_size": 256},
}
ADAPTER = {"rank": 8, "alpha": 32.0, "dropout": 0.0, "targets": ["q_proj"]}
FILES = {
    "full": {"lora": None},  # the first ones: without a key for each part
    "lora": {"lora": ADAPTER},
    "prefix": {"score": "prefix", "lora": None, "prefix_head": None, "token_weight": True},
    "prefix_lora": {"score": "prefix", "lora": ADAPTER, "prefix_head": None},
    "bilinear": {"prefix_head": {"kind": "bilinear", "size": 4}},
    "mlp": {"score": "prefix", "prefix_head": {"kind": "mlp", "size": 4, "token_weight": True}, "token_weight": False},
}
# A value that is not the default of each key that only some kinds have.
SET = {"lora_r": 16, "lora_alpha": 8.0, "lora_dropout": 0.1, "lora_target_modules": ("q_proj",), "prefix_head_size": 4}
SET |= {"token_weight": True, "trainable_layers": 1, "lm_loss_coef": 0.1}


@pytest.mark.parametrize("kind", KINDS)
def test_earlier_keys_name_the_same_config_with_one_line_that_names_the_new_key(kind, caplog):
    settings = {key: value for key, value in EARLIER[kind].items() if key not in ("score", "prefix_head")}
    new = TrainConfig(**RUN, kind=kind, **settings)
    assert not caplog.records
    assert TrainConfig(**RUN, **EARLIER[kind]) == new
    (record,) = caplog.records
    assert record.name == "llm2" and record.message.startswith(f"write kind: {kind} instead of")


def test_earlier_keys_may_stand_in_a_file_and_on_the_command_line(tmp_path, caplog):
    (tmp_path / "train.yaml").write_text("model: testbed\ntrain_file: t\noutput_dir: o\nscore: prefix\n")
    found = load_config(TrainConfig, tmp_path / "train.yaml", ["lora_r=4"])
    assert (found.kind, found.lora_r, len(caplog.records)) == ("prefix_lora", 4, 1)
    assert load_config(TrainConfig, tmp_path / "train.yaml", ["prefix_head=mlp"]).kind == "mlp"


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"kind": "prefix", "prefix_head": "mlp"}, "^prefix_head: found it beside kind: 'prefix'"),
        ({"score": "candidate", "prefix_head": "mlp"}, "^found score: 'candidate', prefix_head: 'mlp', expected kind"),
        ({"score": "prefix", "prefix_head": "mlp", "lora_r": 4}, "^found .* LoRA, expected kind"),
        ({"score": ["prefix"]}, r"^found score: \['prefix'\]"),
    ],
)
def test_earlier_keys_that_contradict_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**RUN, **keys)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", SET)
def test_a_key_of_another_kind_is_refused_and_a_kind_works_without_its_keys(kind, key):
    assert TrainConfig(**RUN, kind=kind).lora_r == (16 if "lora" in kind else None)
    has = {
        "lora": "lora" in kind,
        "prefix_head_size": kind in ("bilinear", "mlp"),
        "token_weight": kind not in ("full", "lora"),
        "trainable_layers": kind in ("full", "prefix"),  # beside an adapter it would train weights that are not saved
        "lm_loss_coef": kind not in ("bilinear", "mlp"),
    }
    if has["lora" if key.startswith("lora") else key]:
        assert getattr(TrainConfig(**RUN, kind=kind, **{key: SET[key]}), key) == SET[key]
    else:
        with pytest.raises(UserError, match=f"^{key}: found .* with kind: {kind}, expected "):
            TrainConfig(**RUN, kind=kind, **{key: SET[key]})


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_begun_with_earlier_keys_resumes_and_only_as_its_kind(kind, tmp_path):
    settings = {key: value for key, value in EARLIER[kind].items() if key not in ("score", "prefix_head")}
    now = TrainConfig(**RUN, kind=kind, **settings)
    rest = {key: getattr(now, key) for key in now.__dataclass_fields__ if key not in ("kind", *EARLIER[kind])}
    (tmp_path / BEGUN).write_text(json.dumps({**rest, **EARLIER[kind], "inputs": {}}))
    require_own(tmp_path, now, {}, "")
    other = TrainConfig(**RUN, kind="mlp" if kind == "bilinear" else "bilinear")
    with pytest.raises(UserError, match=f"kind was '{kind}' and now is '{other.kind}'"):
        require_own(tmp_path, other, {}, "")


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_earlier_versions_are_of_their_kind_and_a_spec_comes_back_from_its_file(kind, tmp_path):
    backbone = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    content = {"model_type": ProcessVerifierConfig.model_type, "backbone_config": backbone, **FILES[kind]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    earlier = ProcessVerifierConfig.from_pretrained(tmp_path)
    adapter = {"lora_r": 8, "lora_target_modules": ("q_proj",)} if "lora" in kind else {}
    head = {"prefix_head_size": 4} if kind in ("bilinear", "mlp") else {}
    assert earlier.spec == VerifierSpec(kind=kind, token_weight=kind in ("prefix", "mlp"), **adapter, **head)
    for names in ("reads_candidates", "is_head", "is_adapter", "is_whole"):
        assert getattr(earlier, names) == getattr(earlier.spec, names)
    ProcessVerifierConfig.of(earlier.spec, earlier.backbone_config).save_pretrained(tmp_path)
    assert ProcessVerifierConfig.from_pretrained(tmp_path).spec == earlier.spec


def test_the_embedded_verifier_of_an_earlier_version_loads_in_silence(caplog):
    with caplog.at_level(logging.INFO):
        verifier = load_verifier("testbed-verifier", torch.device("cpu"), "auto", 10)
    assert verifier.config.kind == "bilinear" and not [one for one in caplog.records if one.name == "llm2"]


@pytest.mark.one_in(6)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_alone_trains_and_its_folder_is_of_that_kind(config, kind):  # noqa: F811
    train(replace(config, kind=kind, num_train_epochs=0.2, evaluations=1))
    assert ProcessVerifier.from_pretrained(config.output_dir).config.kind == kind
