#!/usr/bin/env bash
# Token quality exploration: gold solutions in, triplets out, on whatever this machine has.
#
#   bash scripts/explore_tokens.sh [config.yaml] [key=value ...]
#   bash scripts/explore_tokens.sh configs/llama-3.2-1b-instruct/explore.yaml limit=100
#   bash scripts/explore_tokens.sh configs/testbed/explore.yaml data_parallel=2
#
# Killed, it goes on where it stopped: start the same command again, with as many processes as you like.
# `data_parallel` is the number of processes, by default one a GPU. For several machines that share a folder start it on
# each with ACCELERATE_CONFIG=configs/accelerate/multi_node.yaml, data_parallel counting all machines' processes, and
# ACCELERATE_ARGS="--num_machines N --machine_rank R --main_process_ip HOST --main_process_port 29500".
set -euo pipefail
source "$(dirname "$0")/setup.sh"

[[ ${1:-} == *.yaml ]] && config=$1 && shift || config=configs/llama-3.2-1b-instruct/explore.yaml
plan=$(python -m llm2 explore "$config" "$@" --dry-run)  # a mistake is told before processes are started
read -r processes threads <<<"$plan"

if [ "$processes" -eq 1 ] && [ -z "${ACCELERATE_CONFIG:-}" ]; then
  exec python -m llm2 explore "$config" "$@"
fi
# multi_gpu.yaml serves CPUs as well: all that is wanted of it are processes that know their rank.
exec accelerate launch --quiet --config_file "${ACCELERATE_CONFIG:-configs/accelerate/multi_gpu.yaml}" \
  --num_processes "$processes" --num_cpu_threads_per_process "$threads" ${ACCELERATE_ARGS:-} \
  -m llm2 explore "$config" "$@"
