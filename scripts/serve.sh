#!/usr/bin/env bash
# Serve System 1 with its verifier by vLLM: an OpenAI-compatible server that guides requests which ask for it.
#
#   bash scripts/serve.sh [config.yaml] [key=value ...]     # python -m llm2 serve --help lists the keys
#
# Without a config: Llama-3.2-1B-Instruct where there is a GPU, the testbed elsewhere. Prints a curl line to try.
# vLLM lives in a venv of its own, scripts/setup_vllm.sh.
set -euo pipefail
source "$(dirname "$0")/setup_vllm.sh"
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}  # GiB

command -v nvidia-smi >/dev/null && config=configs/llama-3.2-1b-instruct/serve.yaml || config=configs/testbed/serve.yaml
[[ ${1:-} == *.yaml ]] && config=$1 && shift
exec python -m llm2 serve "$config" "$@"
