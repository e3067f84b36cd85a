#!/usr/bin/env bash
# Train the verifier on triplets, on whatever this machine has.
#
#   bash scripts/train_verifier.sh [config.yaml] [key=value ...]
#   ACCELERATE_CONFIG=configs/accelerate/zero3.yaml bash scripts/train_verifier.sh configs/llama-3.1-8b-instruct/train.yaml
#   bash scripts/train_verifier.sh configs/llama-3.1-8b-instruct/train_lora.yaml  # an adapter on frozen weights
#
# ACCELERATE_CONFIG is one of configs/accelerate/ (or your own); without it cpu.yaml, gpu.yaml or multi_gpu.yaml, by the
# number of GPUs. NUM_PROCESSES is the number of processes where the config leaves it open (all GPUs by default). For
# several machines start it on each with ACCELERATE_CONFIG=configs/accelerate/multi_node.yaml, NUM_PROCESSES counting all
# machines' processes, and ACCELERATE_ARGS="--num_machines N --machine_rank R --main_process_ip HOST
# --main_process_port 29500".
set -euo pipefail
source "$(dirname "$0")/setup.sh"

[[ ${1:-} == *.yaml ]] && config=$1 && shift || config=configs/llama-3.2-1b-instruct/train.yaml
read -r gpus cores < <(python -c 'import torch; print(torch.cuda.device_count(), torch.get_num_threads())')
case $gpus in
  0) default=cpu processes=1 ;;
  1) default=gpu processes=1 ;;
  *) default=multi_gpu processes=$gpus ;;
esac
processes=${NUM_PROCESSES:-$processes}
threads=$((cores / processes))

python -m llm2 train "$config" "$@" --dry-run  # a mistake is told before processes are started
accelerate launch --quiet --config_file "${ACCELERATE_CONFIG:-configs/accelerate/$default.yaml}" \
  --num_processes "$processes" --num_cpu_threads_per_process "$((threads > 0 ? threads : 1))" \
  ${ACCELERATE_ARGS:-} \
  -m llm2 train "$config" "$@"
