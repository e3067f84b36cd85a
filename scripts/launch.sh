#!/usr/bin/env bash
# Start a command of llm2 in one process or several; explore_tokens.sh, train_verifier.sh and
# evaluate_gsm8k.sh call it.
#
#   bash scripts/launch.sh COMMAND DEFAULT_CONFIG [config.yaml] [key=value ...]
#
# NUM_PROCESSES      processes to start; by default one for every GPU (every `tensor_parallel` GPUs), one on a CPU
# ACCELERATE_CONFIG  an accelerate config, such as those in configs/accelerate/; default: none for one process,
#                    multi_gpu.yaml for several
# ACCELERATE_ARGS    for several machines that share a folder, on each of them: "--num_machines N --machine_rank R
#                    --main_process_ip HOST --main_process_port 29500", with configs/accelerate/multi_node.yaml and
#                    NUM_PROCESSES counting all machines' processes
set -euo pipefail
source "$(dirname "$0")/setup.sh"

command=$1 config=$2
shift 2
[[ ${1:-} == *.yaml ]] && config=$1 && shift

# Validates the inputs before workers are launched.
plan=$(python -m llm2 "$command" "$config" "$@" --dry-run)
read -r processes threads <<<"$plan"

if [ "$processes" -eq 1 ] && [ -z "${ACCELERATE_CONFIG:-}" ]; then
  # transformers' Trainer would multiply the batch by the GPUs that it sees.
  [ "$command" = train ] && export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
  exec python -m llm2 "$command" "$config" "$@"
fi
# multi_gpu.yaml works on CPUs too: the launcher sets each process's rank and world size.
exec accelerate launch --quiet --config_file "${ACCELERATE_CONFIG:-configs/accelerate/multi_gpu.yaml}" \
  --num_processes "$processes" --num_cpu_threads_per_process "$threads" ${ACCELERATE_ARGS:-} \
  -m llm2 "$command" "$config" "$@"
