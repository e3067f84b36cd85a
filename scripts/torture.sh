#!/usr/bin/env bash
# The long tests: faults, bad input, long runs. Hours on a CPU; goes on where it was stopped, since a part that has left
# results/torture/PART.json is skipped. Prints one table and writes it to results/torture/table.md and, when every part is
# done at full scale, to figs/torture/.
#
#   bash scripts/torture.sh [PART ...] [--scale SHARE]
#
# PART is a module of experiments/torture/ (bad_input, kills, ...); all when none is given. --scale 0.1 tries a tenth.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export HF_HUB_OFFLINE=1

python -m experiments.torture "$@"
