#!/usr/bin/env bash
# Every check: lint, format, all tests, slow ones included. On a CPU, without network once set up.
#
#   bash scripts/test.sh [pytest arguments]
#
# `pytest` alone runs the quick tests.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export HF_HUB_OFFLINE=1

ruff check .
ruff format --check .
python -m pytest --slow "$@"
