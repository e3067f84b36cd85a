#!/usr/bin/env bash
# Run lm-evaluation-harness with the model `llm2`: bash scripts/lm_eval.sh --model llm2 [arguments of lm_eval ...]
set -euo pipefail
source "$(dirname "$0")/setup.sh"
exec python -m llm2.evaluation.lm_eval_model "$@"
