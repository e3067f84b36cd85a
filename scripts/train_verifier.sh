#!/usr/bin/env bash
# Train the verifier on triplets. To resume a killed run from its last checkpoint, run it again.
#
#   bash scripts/train_verifier.sh [config.yaml] [key=value ...]
#   bash scripts/train_verifier.sh configs/llama-3.1-8b-instruct/train_lora.yaml  # an adapter on frozen weights
#   ACCELERATE_CONFIG=configs/accelerate/zero3.yaml bash scripts/train_verifier.sh configs/llama-3.1-8b-instruct/train.yaml
#
# Several processes or machines: see scripts/launch.sh.
set -euo pipefail
exec bash "$(dirname "$0")/launch.sh" train configs/llama-3.2-1b-instruct/train.yaml "$@"
