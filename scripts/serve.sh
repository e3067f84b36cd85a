#!/usr/bin/env bash
# Serve System 1 with its verifier by vLLM, in a venv of its own: bash scripts/serve.sh [config.yaml] [key=value ...]
# Without a config: Llama-3.2-1B-Instruct where there is a GPU, the testbed elsewhere.
set -euo pipefail
source "$(dirname "$0")/setup_vllm.sh"
command -v nvidia-smi >/dev/null && model=llama-3.2-1b-instruct || model=testbed
[[ ${1:-} == *.yaml ]] || set -- configs/$model/serve.yaml "$@"
exec python -m llm2 serve "$@"
