#!/usr/bin/env bash
# The whole method on the embedded testbed, on a CPU, in minutes: explore, then train and evaluate both ends of System 2,
# a verifier that reads every candidate and a head that reads nothing.
# Nothing is precomputed but System 1, which scripts/pretrain_testbed.sh reproduces.
#
#   bash scripts/quickstart.sh
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export HF_HUB_OFFLINE=1

rm -rf results/quickstart
bash scripts/explore_tokens.sh configs/quickstart/explore.yaml
bash scripts/train_verifier.sh configs/quickstart/train.yaml
bash scripts/train_verifier.sh configs/quickstart/train_prefix.yaml
bash scripts/evaluate_gsm8k.sh configs/quickstart/evaluate.yaml
bash scripts/evaluate_gsm8k.sh configs/quickstart/evaluate_prefix.yaml
bash scripts/study.sh quickstart --summary
