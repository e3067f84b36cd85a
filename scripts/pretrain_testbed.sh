#!/usr/bin/env bash
# Train the testbed's System 1 from scratch, as it is committed in llm2/testbed/system1 (25 to 45 minutes on two cores).
#
#   bash scripts/pretrain_testbed.sh [CONFIG.yaml] [key=value ...]
#
# Interrupted, it goes on from its last checkpoint. Try it in a folder of your own:
#
#   bash scripts/pretrain_testbed.sh configs/testbed/pretrain.yaml output_dir=results/system1 steps=100
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

python -m llm2 pretrain "${1:-configs/testbed/pretrain.yaml}" "${@:2}"
