#!/usr/bin/env bash
# Run lm-evaluation-harness with the model `llm2`; takes lm_eval's arguments.
#
#   bash scripts/lm_eval.sh --model llm2 --tasks gsm8k_cot_zeroshot --apply_chat_template \
#     --model_args pretrained=meta-llama/Llama-3.2-1B-Instruct,verifier=results/llama-3.2-1b-instruct/verifier,alpha=0.1,beta=0.25
set -euo pipefail
source "$(dirname "$0")/setup.sh"

exec python -m llm2.evaluation.lm_eval_model "$@"
