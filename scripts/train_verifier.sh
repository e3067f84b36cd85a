#!/usr/bin/env bash
# Train the verifier on triplets: bash scripts/train_verifier.sh [config.yaml] [key=value ...] [--processes N]
set -euo pipefail
source "$(dirname "$0")/setup.sh"
[[ ${1:-} == *.yaml ]] || set -- configs/llama-3.2-1b-instruct/train.yaml "$@"
exec python -m llm2 train "$@"
