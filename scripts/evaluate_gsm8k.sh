#!/usr/bin/env bash
# Decode GSM8K's test problems with and without System 2, grade, compare, write a results folder; killed, go on.
#
#   bash scripts/evaluate_gsm8k.sh [config.yaml] [key=value ...]
#   bash scripts/evaluate_gsm8k.sh configs/qwen2.5-1.5b-instruct/evaluate.yaml data_file=test.jsonl limit=200
#
# A config with alphas, betas, top_ks or temperatures (sweep*.yaml) chooses them on a validation split first.
# NUM_PROCESSES is the number of processes that share the problems, on GPUs or the CPU: all GPUs by default, else one.
set -euo pipefail
source "$(dirname "$0")/setup.sh"

[[ ${1:-} == *.yaml ]] && config=$1 && shift || config=configs/llama-3.2-1b-instruct/evaluate.yaml
[[ $(basename "$config") == sweep* ]] && command=sweep || command=evaluate
read -r gpus cores < <(python -c 'import torch; print(torch.cuda.device_count(), torch.get_num_threads())')
processes=${NUM_PROCESSES:-$((gpus > 0 ? gpus : 1))}
if [ "$processes" -eq 1 ]; then
  exec python -m llm2 "$command" "$config" "$@"
fi

python -m llm2 "$command" "$config" "$@" --dry-run  # a mistake is told before processes are started
threads=$((cores / processes))
accelerate launch --quiet --config_file configs/accelerate/multi_gpu.yaml \
  --num_processes "$processes" --num_cpu_threads_per_process "$((threads > 0 ? threads : 1))" \
  -m llm2 "$command" "$config" "$@"
