#!/usr/bin/env bash
# Train the testbed's System 1 from scratch, or go on: bash scripts/pretrain_testbed.sh [config.yaml] [key=value ...]
set -euo pipefail
source "$(dirname "$0")/setup.sh"
[[ ${1:-} == *.yaml ]] || set -- configs/testbed/pretrain.yaml "$@"
exec python -m experiments pretrain "$@"
