#!/usr/bin/env bash
# datasets 5.2.0: one number in a column of JSON Lines changes the strings of the other lines.
#
# A column with numbers and strings gets the feature Json, which stores each value as it is written and decodes it when it
# is read; strings are decoded too. So an answer "007" comes back as the number 7, "true" as a boolean, "[1, 2]" as a list,
# and only what is no JSON stays a string. Without the one number, all are strings. datasets 4.7.0 does the same. Seen:
#
#   with a number: [5, 7, True, [1, 2], 'five']
#   without: ['007', 'true', '[1, 2]', 'five']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 2>/dev/null
cat >"$folder/probe.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import datasets

folder = Path(sys.argv[1])
strings = ["007", "true", "[1, 2]", "five"]
for name, answers in (("with a number", [5, *strings]), ("without", strings)):
    path = folder / f"{len(answers)}.jsonl"
    path.write_text("".join(json.dumps({"answer": answer}) + "\n" for answer in answers))
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "cache"))
    print(f"{name}: {[row['answer'] for row in rows]}")
PYTHON
seen=$(HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/probe.py" "$folder" 2>/dev/null)
echo "$seen"
expected="with a number: [5, 7, True, [1, 2], 'five']
without: ['007', 'true', '[1, 2]', 'five']"
[ "$seen" = "$expected" ] || { echo "changed: expected $expected" >&2; exit 1; }
