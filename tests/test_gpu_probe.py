"""The probe for GPUs runs, with a tiny model on a CPU."""

import gpu_probe
import pytest
import torch

CPU = torch.device("cpu")


def test_versions_are_printed(capsys):
    gpu_probe.env(CPU, tiny=True)
    assert capsys.readouterr().out.startswith(f"torch {torch.__version__} transformers")


@pytest.mark.slow
def test_every_part_runs_and_says_that_all_is_well(capsys):
    gpu_probe.sdpa(CPU, tiny=True)
    gpu_probe.exact(CPU, tiny=True)
    gpu_probe.step(CPU, tiny=True)
    printed = capsys.readouterr().out
    assert printed.count("second") == 40 and "slowest first call" in printed
    assert "those of eager forwards: yes" in printed and printed.count("8 of 8 as the slow reference") == 4
    assert printed.count("ms a step") == 4
