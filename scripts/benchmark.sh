#!/usr/bin/env bash
# Measure speed and memory on this machine; writes results/benchmark/NAME.json and prints its table.
#
#   bash scripts/benchmark.sh NAME [config.yaml] [key=value ...]
#
# NAME is a file of configs/benchmark/: decode (guided decoding against transformers' generate), throughput (the same with
# the testbed's trained systems), train (a training step of the verifier against plain sequences and the bare backbone),
# rollouts (exploration's rollouts against generate), labels (exploration's labels against an exhaustive reference: half
# an hour on one core), served (vLLM against our decoder, plain and guided; needs vLLM in this Python:
# `source scripts/setup_vllm.sh; python -m benchmarks configs/benchmark/served.yaml`).
set -euo pipefail
source "$(dirname "$0")/setup.sh"

name=${1:?which benchmark? one of: $(basename -s .yaml configs/benchmark/*.yaml | tr '\n' ' ')}
shift
[[ ${1:-} == *.yaml ]] && config=$1 && shift || config=configs/benchmark/$name.yaml
python -m benchmarks "$config" "$@"
