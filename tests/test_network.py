"""Nothing is reached unless a hub id is named, and nothing about the user lands in a file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.torture import network
from llm2.common.config_file import as_dict, load_config
from llm2.common.home import with_home, without_home
from llm2.config import EvaluateConfig


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network")
    finished, home = network.run_commands(folder)
    return folder, finished, home


@pytest.mark.slow
def test_the_commands_work_without_network(ran):
    folder, finished, _ = ran
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert network.addresses_asked_for(folder) == []


@pytest.mark.slow
def test_no_file_holds_tokens_user_host_or_home(ran):
    """The folder that is searched holds checkpoints, model cards, configs, metrics and the report."""
    found, searched = network.leaks(ran[2] / "out")
    assert found == [] and searched > 30


@pytest.mark.slow
def test_no_file_is_a_pickle_of_settings(ran):
    assert not list((ran[2] / "out").rglob("training_args.bin"))


@pytest.mark.long
def test_a_hub_id_is_the_one_thing_that_reaches_out(tmp_path):
    environment = network.marked_environment(tmp_path)
    line = [sys.executable, "-m", "llm2", "explore", "model=owner/name", "task=testbed", "output=x.jsonl", "device=cpu"]
    finished = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert finished.returncode == 2 and "nor available from the hub" in finished.stderr
    assert network.addresses_asked_for(tmp_path) != []


def test_the_search_finds_the_mark_in_names_texts_and_archives(tmp_path):
    import torch

    (tmp_path / "text.json").write_text(f"/home/{network.MARK}user/x")
    torch.save({"path": network.MARK}, tmp_path / "state.pt")
    (tmp_path / f"events.{network.MARK}host").write_text("")
    (tmp_path / "clean.json").write_text("")
    found, searched = network.leaks(tmp_path)
    assert sorted(found) == sorted(["text.json", "state.pt", f"events.{network.MARK}host"]) and searched == 4


def test_the_home_folder_is_a_tilde_in_files_and_a_folder_in_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    values = {"a": "/home/ann/m", "b": ["/home/ann", "/home/anna"], "c": None, "d": "x/home/ann/m"}
    assert without_home(values) == {"a": "~/m", "b": ["~", "/home/anna"], "c": None, "d": "x/home/ann/m"}
    assert with_home(["~/m", "~", "~ann", 3]) == ["/home/ann/m", "/home/ann", "~ann", 3]
    overrides = ["model=~/m", "task=gsm8k", "output_dir=/home/ann/o", "reuse_from=[~/a, b]"]
    config = load_config(EvaluateConfig, None, overrides)
    assert (config.model, config.reuse_from) == ("/home/ann/m", ("/home/ann/a", "b"))
    written = as_dict(config)
    assert (written["model"], written["output_dir"], written["reuse_from"]) == ("~/m", "~/o", ["~/a", "b"])
    assert os.path.isabs(Path(config.output_dir))
