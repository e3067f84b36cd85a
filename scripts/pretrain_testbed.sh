#!/usr/bin/env bash
# Train the testbed's System 1 from scratch, as it is committed in llm2/testbed/system1 (25 to 45 minutes on two cores).
#
#   bash scripts/pretrain_testbed.sh [config.yaml [key=value ...]]
#
# An interrupted run resumes from its last checkpoint. A short trial in another folder:
#
#   bash scripts/pretrain_testbed.sh configs/testbed/pretrain.yaml output_dir=results/system1 max_steps=100
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

python -m experiments pretrain "${1:-configs/testbed/pretrain.yaml}" "${@:2}"
