#!/usr/bin/env bash
# transformers 5.24.0: an output class of one's own that declares the field `past_key_values` cannot be made any more.
#
# ModelOutput renames that keyword argument to `cache` in the constructor of every subclass, also of one whose dataclass
# declares `past_key_values` itself and has no `cache`. With 5.23.0 the same class works. Seen with torch 2.13.0:
#
#   5.23.0: made
#   5.24.0: TypeError: Output.__init__() got an unexpected keyword argument 'cache'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat >"$folder/probe.py" <<'PYTHON'
from dataclasses import dataclass

import transformers
from transformers.utils import ModelOutput


@dataclass
class Output(ModelOutput):
    scores: list | None = None
    past_key_values: object | None = None


try:
    Output(scores=[1.0], past_key_values=None)
    print(f"{transformers.__version__}: made")
except TypeError as error:
    print(f"{transformers.__version__}: TypeError: {error}")
PYTHON
seen=
for version in 5.23.0 5.24.0; do
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 "transformers==$version" 2>/dev/null
  line=$("$folder/venv/bin/python" "$folder/probe.py" 2>/dev/null)
  echo "$line"
  seen+=$line$'\n'
done
expected="5.23.0: made
5.24.0: TypeError: Output.__init__() got an unexpected keyword argument 'cache'
"
[ "$seen" = "$expected" ] || { echo "changed: expected $expected" >&2; exit 1; }
