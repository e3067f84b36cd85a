"""The command line as a user meets it: exit status and one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import benchmarks.__main__
import experiments.__main__
from llm2.__main__ import COMMANDS, main
from llm2.common.loading import load_system1
from llm2.config import VerifierSpec
from llm2.errors import UserError
from llm2.verifier.load import load_verifier
from llm2.verifier.model import ProcessVerifier

LABORATORY = experiments.__main__.COMMANDS
MAINS = {**dict.fromkeys([*COMMANDS, "check", "report"], main)}
MAINS |= dict.fromkeys([*LABORATORY, "study"], experiments.__main__.main)


@pytest.mark.parametrize("command", MAINS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        MAINS[command]([command, "--help"])
    assert stopped.value.code == 0 and "usage" in capsys.readouterr().out


def refusal(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    return printed.err


def test_help_lists_every_key_with_type_default_and_sentence(capsys):
    for command, (config, *_) in {**COMMANDS, **LABORATORY}.items():
        with pytest.raises(SystemExit):
            MAINS[command]([command, "--help"])
        lines = capsys.readouterr().out.splitlines()
        for key in config.__dataclass_fields__:
            (number,) = [n for n, line in enumerate(lines) if line.startswith(f"  {key}: ")]
            assert lines[number + 1].startswith("      ") and lines[number + 1].endswith("."), f"{command}: {key}"


def test_a_misspelt_key_is_answered_with_the_nearest_one(capsys):
    text = refusal(capsys, "train", "configs/llama-3.2-1b-instruct/train.yaml", "train_epochs=3")
    assert "override 'train_epochs=3': unknown key 'train_epochs'; did you mean 'num_train_epochs'?" in text
    assert "unknown key 'modell'; did you mean 'model'?" in refusal(capsys, "evaluate", "modell=testbed")


def test_a_command_without_arguments_says_which_key_it_needs(capsys):
    assert "the key 'model' is missing: expected model=VALUE" in refusal(capsys, "evaluate")


@pytest.mark.parametrize("command", ["explore", "train", "evaluate"])
def test_without_gpu_or_hub_the_llama_configs_point_to_the_quickstart(capsys, command):
    config = f"configs/llama-3.2-1b-instruct/{command}.yaml"
    for overrides in (["device=cuda"], ["device=cpu"]):
        text = refusal(capsys, command, config, *overrides)
        assert "model=testbed" in text and "model=<local folder>" in text and text.count("\n") == 1


def test_a_missing_model_folder_is_refused(capsys):
    config = "configs/llama-3.2-1b-instruct/train.yaml"
    assert "expected a folder" in refusal(capsys, "train", config, "device=cpu", "model=./nowhere")


def test_a_dry_run_refuses_missing_inputs_and_passes_otherwise(system1_folder, tmp_path, capsys):
    train = ("train", "configs/llama-3.2-1b-instruct/train.yaml", "device=cpu", f"model={system1_folder}")
    assert "cannot read the triplets nowhere.jsonl" in refusal(capsys, *train, "train_file=nowhere.jsonl", "--dry-run")
    assert main([*train, "train_file=dataset/testbed.jsonl", "--dry-run"]) == 0
    assert capsys.readouterr().out == "1 1\n"  # processes, threads of each
    evaluate = ("evaluate", "configs/testbed/evaluate.yaml", f"model={system1_folder}")
    ProcessVerifier.from_system1(system1_folder, local_files_only=True).save_pretrained(tmp_path)
    verifier = f"verifier={tmp_path}"
    assert "'a/b/c': expected a folder with config.json" in refusal(capsys, *evaluate, "verifier=a/b/c", "--dry-run")
    assert "majority_at: found 20" in refusal(capsys, *evaluate, verifier, "num_samples=3", "--dry-run")
    assert main([*evaluate, verifier, "--dry-run"]) == 0


def test_an_interrupt_ends_with_130(monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("llm2.__main__.run_report", interrupt)
    assert main(["report", "anywhere"]) == 130


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(28, "No space left on device", "out/a"), "out/a: No space left on device"),
        (RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:17315."), "one that failed says why"),
        (torch.distributed.DistNetworkError("Broken pipe"), "the processes of this run lost each other"),
    ],
)
def test_errors_of_the_machine_are_sentences(error, message, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr("llm2.__main__.run_check", fail)
    assert message in refusal(capsys, "check", "x.jsonl", "--tokenizer", "x")


def test_check_accepts_and_refuses(system1_folder, tmp_path, capsys):
    from test_train import write_triplets

    from llm2.common.loading import load_tokenizer

    path = tmp_path / "triplets.jsonl"
    write_triplets(path, load_tokenizer(system1_folder), 3)
    assert main(["check", str(path), "--tokenizer", system1_folder]) == 0
    assert "3 solutions, 3 triplets" in capsys.readouterr().out
    record = json.loads(path.read_text().splitlines()[0])
    record["samples"][0][0] -= 1
    path.write_text(json.dumps(record))
    assert "expected token" in refusal(capsys, "check", str(path), "--tokenizer", system1_folder)


def test_a_benchmark_has_help_and_refuses_a_misspelt_key(capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmarks.__main__.main(["--help"])
    assert stopped.value.code == 0 and "keys of benchmark=decode:" in capsys.readouterr().out
    assert benchmarks.__main__.main(["configs/benchmark/decode.yaml", "round=3"]) == 2
    assert "benchmarks: override 'round=3': unknown key 'round'; did you mean 'rounds'?" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["llm2", "experiments"])
def test_the_modules_run_as_programs(module):
    finished = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True)
    assert finished.returncode == 2 and "usage" in finished.stderr


def test_a_folder_that_cannot_be_made_is_named_and_debug_shows_the_traceback(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    command = ["evaluate", "model=testbed", "task=testbed", "modes=[plain_greedy]", "limit=1"]
    command.append(f"output_dir={tmp_path}/file/sub")
    assert main(command) == 2
    assert capsys.readouterr().err == f"llm2 evaluate: {tmp_path}/file/sub: Not a directory\n"
    with pytest.raises(NotADirectoryError):
        main([*command, "--debug"])


HEAD = VerifierSpec(kind="bilinear", prefix_head_size=2)


def _damaged(folder: Path, damage: str) -> None:
    """A verifier whose folder has one fault."""
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        return
    state = load_file(weights)
    weights.unlink()
    if damage == "no head":
        save_file({key: tensor for key, tensor in state.items() if "score" not in key}, weights, {"format": "pt"})
    else:
        torch.save(state, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "damage, message",
    [
        ("truncated", "could not be loaded: "),
        ("no head", "do not hold 'score.weight'"),
        ("pickle", "no file named model.safetensors"),
    ],
)
@pytest.mark.parametrize("spec", [VerifierSpec(), HEAD], ids=["full", "head"])
def test_a_damaged_verifier_is_refused(system1_folder, tmp_path, damage, message, spec):
    ProcessVerifier.from_system1(system1_folder, spec).save_pretrained(tmp_path)
    _damaged(tmp_path, damage)
    if spec.is_head:
        message = {"no head": "not those of its head: Missing", "pickle": "model.safetensors"}.get(damage, message)
    with pytest.raises(UserError, match=message):
        load_verifier(str(tmp_path), torch.device("cpu"), "auto", 10, load_system1(system1_folder, torch.device("cpu")))
