#!/usr/bin/env bash
# Every check: lint, format, all tests, slow ones included. On a CPU, without network once set up.
#
#   bash scripts/test.sh [pytest arguments]            # with the versions of requirements.lock
#   bash scripts/test.sh --lowest [pytest arguments]   # all but the slow tests, with the lowest versions that pyproject.toml allows
#   bash scripts/test.sh --newest [pytest arguments]   # all but the slow tests, with the newest releases that it allows, today's
#
# `pytest` alone runs the quick tests, minutes. --lowest and --newest make .venv-lowest and .venv-newest (some GB:
# PyPI's torch brings CUDA's libraries).
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export HF_HUB_OFFLINE=1

case ${1:-} in
  --lowest) resolution=lowest-direct ;;
  --newest) resolution=highest ;;
  *)
    python tests/versions.py
    ruff check .
    ruff format --check .
    exec python -m pytest --slow "$@"
    ;;
esac
venv=$PWD/.venv-${1#--}
[ -x "$venv/bin/python" ] || uv venv --quiet --python "$python" "$venv"
extras=(--extra deepspeed --extra eval --extra gguf --extra report --extra test)
uv pip install --quiet --upgrade --compile-bytecode --python "$venv/bin/python" --resolution "$resolution" \
  -r pyproject.toml "${extras[@]}"
export PATH=$venv/bin:$PATH
python tests/versions.py
exec python -m pytest --cases "${@:2}"
