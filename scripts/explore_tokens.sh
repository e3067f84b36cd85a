#!/usr/bin/env bash
# Token quality exploration: bash scripts/explore_tokens.sh [config.yaml] [key=value ...] [--processes N]
set -euo pipefail
source "$(dirname "$0")/setup.sh"
[[ ${1:-} == *.yaml ]] || set -- configs/llama-3.2-1b-instruct/explore.yaml "$@"
exec python -m llm2 explore "$@"
