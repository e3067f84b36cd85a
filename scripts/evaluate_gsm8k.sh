#!/usr/bin/env bash
# Decode a task (GSM8K by default) with and without System 2, grade, compare, write a results folder. To resume a killed
# run, run it again.
#
#   bash scripts/evaluate_gsm8k.sh [config.yaml] [key=value ...]
#   bash scripts/evaluate_gsm8k.sh configs/qwen2.5-1.5b-instruct/evaluate.yaml data_file=test.jsonl limit=200
#
# A config named sweep*.yaml chooses alpha, beta, top_k and temperature on a validation split first.
# Several processes: see scripts/launch.sh. How many there are changes no prediction.
set -euo pipefail
[[ $(basename "${1:-}") == sweep*.yaml ]] && command=sweep || command=evaluate
exec bash "$(dirname "$0")/launch.sh" "$command" configs/llama-3.2-1b-instruct/evaluate.yaml "$@"
