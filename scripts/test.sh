#!/usr/bin/env bash
# Every check: lint, format, all tests, slow ones included. On a CPU, without network once set up.
#
#   bash scripts/test.sh [pytest arguments]
#   bash scripts/test.sh --lowest [pytest arguments]   # the quick tests with the lowest versions that pyproject.toml allows
#
# `pytest` alone runs the quick tests. --lowest makes .venv-lowest, once (some GB: PyPI's torch brings CUDA's libraries).
set -euo pipefail
if [ "${1:-}" = --lowest ]; then
  cd "$(dirname "$0")/.."
  venv=$PWD/.venv-lowest
  if ! cmp -s pyproject.toml "$venv/pyproject.installed"; then
    "${PYTHON:-python3}" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet uv  # pip cannot choose the lowest version
    extras=(--extra deepspeed --extra eval --extra report --extra benchmark --extra study --extra test)
    "$venv/bin/uv" pip install --compile-bytecode --python "$venv/bin/python" --resolution lowest-direct -r pyproject.toml "${extras[@]}"
    cp pyproject.toml "$venv/pyproject.installed"
  fi
  export HF_HUB_OFFLINE=1 PATH=$venv/bin:$PATH
  exec "$venv/bin/python" -m pytest "${@:2}"
fi
source "$(dirname "$0")/setup.sh"
export HF_HUB_OFFLINE=1

ruff check .
ruff format --check .
python -m pytest --slow "$@"
