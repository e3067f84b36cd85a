#!/usr/bin/env bash
# Make .venv with everything in requirements.txt, in the versions of requirements.lock, once; do nothing if that is done.
#
#   bash scripts/setup.sh          set up
#   source scripts/setup.sh        set up and activate; the other scripts do this
#
# PYTHON names the interpreter to make .venv with (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
  python=$(command -v "${candidate:-none}") || continue
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' && break
  python=
done
if [ -z "${python:-}" ]; then
  echo "setup.sh: expected Python 3.11 or newer, found none; install it, or set PYTHON=<path>" >&2
  exit 2
fi

if ! cat requirements.txt requirements.lock | cmp -s - .venv/requirements.installed; then
  echo "setup.sh: installing requirements.txt into .venv (once, some minutes)" >&2
  .venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv
  # The environment variables, and not -c, also reach what source packages are built with.
  PIP_CONSTRAINT=$PWD/requirements.lock PIP_BUILD_CONSTRAINT=$PWD/requirements.lock \
    .venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt
  cat requirements.txt requirements.lock >.venv/requirements.installed
fi
source .venv/bin/activate

export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-true}
# Without a GPU DeepSpeed warns at every start of Python, unless DS_ACCELERATOR is set.
command -v nvidia-smi >/dev/null || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
