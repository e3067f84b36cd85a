#!/usr/bin/env bash
# Make requirements.lock anew: the newest versions that requirements.txt allows, of everything that it needs, for Python
# 3.11 to 3.13. Then run scripts/test.sh, and update the table in tests/README.md.
#
#   bash scripts/lock.sh
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(mktemp -d)  # not .venv, whose set-up needs the lock
trap 'rm -rf "$venv"' EXIT
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep -o '^uv[^ ]*' requirements.txt)"
"$venv/bin/uv" pip compile --quiet --upgrade --universal --python-version 3.11 --no-annotate \
  --custom-compile-command "bash scripts/lock.sh" --output-file requirements.lock requirements.txt
