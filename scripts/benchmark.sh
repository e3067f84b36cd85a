#!/usr/bin/env bash
# Measure speed and memory on this machine; writes results/benchmark/NAME.json and prints its table.
#
#   bash scripts/benchmark.sh NAME [config.yaml] [key=value ...]
#
# NAME is that of a file in configs/benchmark/: decode (guided decoding against transformers' generate), problems (the
# same with the testbed's trained systems), train (the verifier's training step against the plain way and against the
# bare backbone), rollouts (exploration's rollouts against sampling with generate), labels (exploration's labels against
# an exhaustive reference: half an hour on a core).
set -euo pipefail
source "$(dirname "$0")/setup.sh"

name=${1:?which benchmark? one of: $(basename -s .yaml configs/benchmark/*.yaml | tr '\n' ' ')}
shift
[[ ${1:-} == *.yaml ]] && config=$1 && shift || config=configs/benchmark/$name.yaml
python -m llm2 benchmark "$config" "$@"
