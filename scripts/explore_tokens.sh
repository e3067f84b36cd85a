#!/usr/bin/env bash
# Token quality exploration: gold solutions in, triplets out.
#
#   bash scripts/explore_tokens.sh [config.yaml] [key=value ...]
#   bash scripts/explore_tokens.sh configs/llama-3.2-1b-instruct/explore.yaml limit=100
set -euo pipefail
source "$(dirname "$0")/setup.sh"

config=${1:-configs/llama-3.2-1b-instruct/explore.yaml}
python -m llm2 explore "$config" "${@:2}"
