#!/usr/bin/env bash
# The whole method on the embedded testbed, on a CPU, in minutes: explore, train, evaluate.
# Nothing is precomputed but System 1, which scripts/pretrain_testbed.sh reproduces.
#
#   bash scripts/quickstart.sh
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export HF_HUB_OFFLINE=1

rm -rf results/quickstart
bash scripts/explore_tokens.sh configs/quickstart/explore.yaml
bash scripts/train_verifier.sh configs/quickstart/train.yaml
bash scripts/evaluate_gsm8k.sh configs/quickstart/evaluate.yaml
