"""Two processes on the CPU: the same gradients as one, and DeepSpeed's ZeRO-2 and ZeRO-3 for real."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from ranks import run_ranks
from test_collate import examples
from test_train import gradients, write_triplets

from llm2.common.config_file import as_dict
from llm2.common.distributed import destroy_group, dist_info
from llm2.common.loading import load_tokenizer
from llm2.config import TrainConfig
from llm2.verifier.model import ProcessVerifier
from llm2.verifier.train import train
from llm2.verifier.triplets import Example

ROOT = Path(__file__).parent.parent
IDS = torch.arange(3, 40)[None]


def launch(*arguments: str | Path) -> None:
    """Run a Python module in a process of its own; a failure shows what it printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "tests"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        ),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", *map(str, arguments)]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]


def save_gradients(system1_folder: str, output: Path, data: list[Example], per_device: int) -> None:
    moved = gradients(system1_folder, f"{output}.run", data, per_device, 2)
    if dist_info().is_main:
        torch.save(moved, output)
    destroy_group()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("batch", [32, pytest.param(256, marks=pytest.mark.slow)])
def test_accumulation_and_ranks_change_no_gradient(system1_folder, tmp_path, batch):
    """One whole batch, four that accumulate, and two processes; six solutions fewer make the last batch uneven."""
    found = {}
    for solutions in (batch, batch - 6):
        data = examples(solutions)
        found[solutions] = gradients(system1_folder, tmp_path, data, batch, 1)
        accumulated = gradients(system1_folder, tmp_path, data, batch // 4, 4)
        for name, expected in found[solutions].items():
            torch.testing.assert_close(accumulated[name], expected, atol=1e-5, rtol=0, msg=name)
    whole, uneven = found.values()
    output = tmp_path / "moved.pt"
    assert run_ranks(save_gradients, system1_folder, output, examples(batch - 6), batch // 4) == [0, 0]
    for name, moved in torch.load(output).items():
        torch.testing.assert_close(moved, uneven[name], atol=1e-5, rtol=0, msg=name)
    assert max((whole[name] - moved).abs().max() for name, moved in uneven.items()) > 1e-4


@pytest.fixture
def config(system1_folder, tmp_path) -> TrainConfig:
    # 9 held out, 34 trained on: uneven batches on two ranks
    write_triplets(tmp_path / "triplets.jsonl", load_tokenizer(system1_folder), 43)
    return TrainConfig(
        model=system1_folder,
        train_file=str(tmp_path / "triplets.jsonl"),
        output_dir=str(tmp_path / "one"),
        eval_share=0.2,
        num_train_epochs=1.0,
        learning_rate=1e-3,
        global_batch_size=8,
        per_device_train_batch_size=2,
        device="cpu",
    )


def on_two_cpus(stage: int, folder: Path, precision: str) -> Path:
    """configs/accelerate/zero{stage}.yaml for two processes on a CPU."""
    accelerate = yaml.safe_load((ROOT / "configs" / "accelerate" / f"zero{stage}.yaml").read_text())
    accelerate |= {"num_processes": 2, "use_cpu": True, "mixed_precision": precision}
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(accelerate))
    return folder / "accelerate.yaml"


def train_with_deepspeed(config: TrainConfig, stage: int, folder: Path) -> dict:
    (folder / "train.yaml").write_text(yaml.safe_dump(as_dict(config) | {"output_dir": str(folder / "zero")}))
    accelerate = on_two_cpus(stage, folder, "bf16" if config.bf16 is True else "no")
    launch("llm2", "train", folder / "train.yaml", "--processes", 2, "--accelerate-config", accelerate)
    return json.loads((folder / "zero" / "training.json").read_text())


@torch.inference_mode()
def scores(folder: Path) -> torch.Tensor:
    return ProcessVerifier.from_pretrained(folder).eval()(IDS).scores


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"kind": "lora", "lora_r": 4, "lm_loss_coef": 0.1}, {"kind": "bilinear"}, {"kind": "bilinear", "bf16": True}],
    ids=["lora", "head", "head in bfloat16"],
)
def test_zero2_trains_an_adapter_or_a_head_as_one_process_does(config, tmp_path, changes):
    changed = replace(config, **changes)
    near = 0.02 if changed.bf16 is True else 1e-3  # DeepSpeed holds the head in bfloat16, one process in float32
    expected, found = train(changed), train_with_deepspeed(changed, 2, tmp_path)
    for key in ("eval_pair_loss", "eval_mean_margin", "eval_pairs", "system1_pair_accuracy"):
        assert found[key] == pytest.approx(expected[key], abs=near / 10), key
    torch.testing.assert_close(scores(tmp_path / "zero"), scores(tmp_path / "one"), atol=near, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "prefix"])
def test_zero3_trains_as_one_process_does_and_its_shards_make_the_same_verifier(config, tmp_path, kind):
    config = replace(config, kind=kind)
    expected, found = train(config), train_with_deepspeed(config, 3, tmp_path)
    for key in ("eval_pair_loss", "eval_mean_margin", "eval_pairs"):
        assert found[key] == pytest.approx(expected[key], abs=1e-4), key
    torch.testing.assert_close(scores(tmp_path / "zero"), scores(tmp_path / "one"), atol=1e-3, rtol=0)

    checkpoint = max((tmp_path / "zero").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    gathered = scores(checkpoint)
    (checkpoint / "model.safetensors").unlink()  # now there are DeepSpeed's shards alone
    ProcessVerifier.from_pretrained(checkpoint).save_pretrained(tmp_path / "from_shards")
    assert torch.equal(scores(tmp_path / "from_shards"), gathered), "bit for bit, both read from a file of weights"
