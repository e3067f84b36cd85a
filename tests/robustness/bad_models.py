"""Bad models, tokenizers and verifiers: folders of the testbed's System 1 or of a verifier, with one fault each."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from llm2.common.loading import TESTBED
from tests.robustness.bad_cases import EVALUATE, EXPLORE
from tests.robustness.bad_input import Case, Stock

WEIGHTS = "model.safetensors"
GUIDED = (*EVALUATE, "modes=[guided_greedy]")


def model(name: str, damage: Callable[[Path], object], *says: str, arguments: tuple[str, ...] = EVALUATE) -> Case:
    """A copy of System 1, damaged."""

    def make(folder: Path, stock: Stock) -> list[str]:
        shutil.copytree(TESTBED, folder / "m")
        damage(folder / "m")
        return [*arguments, "model=./m"]

    return Case(name, "models", make, ("./m", *says))


def verifier(name: str, damage: Callable[[Path], object], *says: str, arguments: tuple[str, ...] = GUIDED) -> Case:
    """A copy of a verifier of the testbed's System 1, damaged."""

    def make(folder: Path, stock: Stock) -> list[str]:
        shutil.copytree(stock.verifier, folder / "v")
        damage(folder / "v")
        return [*arguments, "verifier=./v"]

    return Case(name, "verifiers", make, ("verifier './v'", *says))


def truncate(folder: Path) -> None:
    weights = folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:100_000])


def without(part: str) -> Callable[[Path], None]:
    """Drop the weights with this in their name."""

    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        state = load_file(folder / WEIGHTS)
        kept = {key: tensor for key, tensor in state.items() if part not in key}
        assert len(kept) < len(state)
        save_file(kept, folder / WEIGHTS, {"format": "pt"})

    return damage


def pickled(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def sharded(damage: Callable[[Path], object]) -> Callable[[Path], None]:
    """The weights in two shards, the second damaged."""

    def split(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        state = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(state)
        files = {name: f"model-0000{1 + (i >= len(names) // 2)}-of-00002.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            save_file({n: state[n] for n in names if files[n] == file}, folder / file, {"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": files}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
        damage(folder / "model-00002-of-00002.safetensors")

    return split


def config(**changes) -> Callable[[Path], None]:
    """Change keys of config.json; None drops one."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | changes
        content = {key: value for key, value in content.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(content))

    return damage


def write(file: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(text)


def remote_code(folder: Path) -> None:
    """A model type of its own, with code in the folder that leaves a trace if it is run."""
    config(model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"})(folder)
    (folder / "mine.py").write_text("open('/tmp/llm2-remote-code-was-run', 'w')\n")


def tokenizer_code(folder: Path) -> None:
    content = json.loads((folder / "tokenizer_config.json").read_text())
    content |= {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": ["mine.T", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    (folder / "mine.py").write_text("class T: pass\n")


def encoder(folder: Path) -> None:
    from transformers import BertConfig

    BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(folder)


def other_tokenizer(folder: Path) -> None:
    """Two tokens have changed places."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def wider_backbone(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["backbone_config"]["intermediate_size"] = 500
    (folder / "config.json").write_text(json.dumps(content))


def more_tokens(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    write("q.jsonl", '{"question": "Zweiundvierzig?", "answer": "#### 42"}')(folder)
    tokenizer.add_tokens(["Zweiundvierzig"])
    tokenizer.save_pretrained(folder)


def smaller(folder: Path) -> None:
    """A verifier of a System 1 with half the vocabulary."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from llm2.verifier.model import ProcessVerifier

    small = AutoConfig.from_pretrained(TESTBED, vocab_size=300)
    torch.manual_seed(0)
    shutil.rmtree(folder)
    AutoModelForCausalLM.from_config(small).save_pretrained(folder.parent / "small")
    ProcessVerifier.from_system1(str(folder.parent / "small")).save_pretrained(folder)


def head(folder: Path) -> None:
    """In its place a prefix head, without its weights."""
    from llm2.config import VerifierSpec
    from llm2.verifier.model import ProcessVerifier

    shutil.rmtree(folder)
    made = ProcessVerifier.from_system1("testbed", VerifierSpec(kind="bilinear", prefix_head_size=2))
    made.save_pretrained(folder)
    (folder / WEIGHTS).unlink()


def of_another_system1(folder: Path) -> None:
    """A prefix head that was trained on other states."""
    head(folder)
    config(system1_fingerprint="0" * 64)(folder)


CASES = [
    model("truncated weights", truncate, "could not be loaded"),
    model("weights of zeros", write(WEIGHTS, "\0" * 1000), "could not be loaded"),
    model("empty weights", write(WEIGHTS, ""), "could not be loaded"),
    model("no weights", lambda folder: (folder / WEIGHTS).unlink(), "model.safetensors"),
    model("only a pickle", pickled, "model.safetensors"),
    model("a layer is missing", without("layers.1."), "do not hold 'model.layers.1.", "missing"),
    model("a missing shard", sharded(Path.unlink), "model-00002-of-00002.safetensors"),
    model("a truncated shard", sharded(lambda path: path.write_bytes(b"12345")), "could not be loaded"),
    model("a broken index", lambda f: [sharded(Path.exists)(f), write(f"{WEIGHTS}.index.json", "{")(f)], "loaded"),
    model("broken config", write("config.json", "{"), "config.json"),
    model("empty config", write("config.json", "{}"), "could not be loaded", "model_type"),
    model("unknown type", config(model_type="nonsense"), "could not be loaded", "nonsense"),
    model("a shape that is not the weights'", config(hidden_size=320), "of shape [", "expected ["),
    model("weights of another shape", config(intermediate_size=64), "'model.layers.0.mlp", "expected [160, 64]"),
    model("a width of text", config(hidden_size="wide"), "could not be loaded", "hidden_size"),
    model("remote code", remote_code, "could not be loaded", "custom code"),
    model("an encoder", encoder, "expected a decoder-only language model", "'bert'"),
    model("encoder and decoder", config(model_type="t5"), "expected a decoder-only language model", "'t5'"),
    model("a verifier for System 1", config(model_type="llm2_process_verifier"), "llm2_process_verifier"),
    model("broken tokenizer", write("tokenizer.json", "{"), "could not be loaded"),
    model("tokenizer of nothing", write("tokenizer.json", "{}"), "could not be loaded"),
    model("code for a tokenizer", tokenizer_code, "could not be loaded"),
    model(
        "a token that is not embedded",
        more_tokens,
        "writes the token",
        "vocabulary of",
        arguments=(*EVALUATE, "data_file=m/q.jsonl"),
    ),
    verifier("truncated", truncate, "could not be loaded"),
    verifier("no head", without("score"), "do not hold 'score.weight'"),
    verifier("no layer", without("layers.0."), "do not hold 'backbone.layers.0."),
    verifier("weights of another shape", wider_backbone, "'backbone.layers.0.mlp", "expected ["),
    verifier("a pickle", pickled, "model.safetensors"),
    verifier("no config", lambda folder: (folder / "config.json").unlink(), "expected a folder with config.json"),
    verifier("a broken verifier config", write("config.json", "{"), "config.json"),
    verifier("a language model", config(model_type="llama"), "'model_type'", "'llama'", "'llm2_process_verifier'"),
    verifier("no backbone config", config(backbone_config=None), "key 'backbone_config'"),
    verifier("another tokenizer", other_tokenizer, "expected System 1's tokenizer"),
    verifier("a smaller vocabulary", smaller, "embeds 300 tokens and System 1 has"),
    verifier("no beta chosen", lambda folder: None, "beta: null", arguments=(*GUIDED, "beta=null")),
    verifier("no beta to explore with", lambda folder: None, "beta: null", arguments=(*EXPLORE, "beta=null")),
    verifier("a prefix head without weights", head, "model.safetensors"),
    verifier("a prefix head of another System 1", of_another_system1, "another System 1"),
]
