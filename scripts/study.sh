#!/usr/bin/env bash
# Run a study of experiments/studies/ (NAME), or go on with one that was stopped; writes its table, data and plot to
# experiments/results/.
#
#   bash scripts/study.sh NAME [--summary | --only AXIS=VALUE ...]
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export HF_HUB_OFFLINE=1

name=${1:?which study? one of: $(basename -s .yaml experiments/studies/*.yaml | tr '\n' ' ')}
python -m experiments study "experiments/studies/$name.yaml" "${@:2}"
