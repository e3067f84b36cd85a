#!/usr/bin/env bash
# Token quality exploration: gold solutions in, triplets out. To resume a killed run, run it again.
#
#   bash scripts/explore_tokens.sh [config.yaml] [key=value ...]
#   bash scripts/explore_tokens.sh configs/llama-3.2-1b-instruct/explore.yaml limit=100
#   NUM_PROCESSES=2 bash scripts/explore_tokens.sh configs/testbed/explore.yaml
#
# Several processes or machines: see scripts/launch.sh. How many there are changes no triplet.
set -euo pipefail
exec bash "$(dirname "$0")/launch.sh" explore configs/llama-3.2-1b-instruct/explore.yaml "$@"
