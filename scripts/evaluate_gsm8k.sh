#!/usr/bin/env bash
# Evaluate with and without System 2: bash scripts/evaluate_gsm8k.sh [config.yaml] [key=value ...] [--processes N]
set -euo pipefail
source "$(dirname "$0")/setup.sh"
[[ ${1:-} == *.yaml ]] || set -- configs/llama-3.2-1b-instruct/evaluate.yaml "$@"
exec python -m llm2 evaluate "$@"
