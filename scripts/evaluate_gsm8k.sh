#!/usr/bin/env bash
# Decode GSM8K's test problems with and without System 2, grade, compare, write a results folder.
#
#   bash scripts/evaluate_gsm8k.sh [config.yaml] [key=value ...]
#   bash scripts/evaluate_gsm8k.sh configs/qwen2.5-1.5b-instruct/evaluate.yaml data_file=test.jsonl limit=200
set -euo pipefail
source "$(dirname "$0")/setup.sh"

config=${1:-configs/llama-3.2-1b-instruct/evaluate.yaml}
python -m llm2 evaluate "$config" "${@:2}"
