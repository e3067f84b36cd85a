#!/usr/bin/env bash
# lm_eval 0.4.13: strict-match of gsm8k_cot reads 18 as 1 where a solution ends in `The answer is 18`, without a full stop.
#
# Its pattern, `The answer is (\-?[0-9\.\,]+).`, wants one more character behind the number. Where there is none, or a line
# break, the number gives its last digit away: 18 becomes 1, 1800 becomes 180, and 5 is [invalid]. A few-shot prompt teaches
# the full stop; gsm8k_cot_zeroshot has the same pattern and no examples. flexible-extract reads the same texts rightly. The
# strict-match answer of each solution, by the task's own filters. Seen:
#
#   'The answer is 18.' -> 18
#   'The answer is 18 eggs' -> 18
#   'The answer is 18' -> 1
#   'The answer is 1800\n\nShe sold' -> 180
#   'The answer is 5' -> [invalid]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check lm_eval==0.4.13 torch==2.13.0 transformers==5.24.0 2>/dev/null
cat >"$folder/probe.py" <<'PYTHON'
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import yaml
from lm_eval.filters import build_filter_ensemble

file = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k-cot-zeroshot.yaml"
strict = next(each for each in yaml.safe_load(file.read_text())["filter_list"] if each["name"] == "strict-match")
steps = [[step.pop("function"), step] for step in strict["filter"]]
ends = ("18.", "18 eggs", "18", "1800\n\nShe sold", "5")
solutions = [SimpleNamespace(resps=[f"The answer is {end}"], doc={}, filtered_resps={}) for end in ends]
build_filter_ensemble("strict-match", steps).apply(solutions)
for solution in solutions:
    print(f"{solution.resps[0]!r} -> {solution.filtered_resps['strict-match']}")
PYTHON
seen=$(HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/probe.py" 2>/dev/null)
echo "$seen"
expected="'The answer is 18.' -> 18
'The answer is 18 eggs' -> 18
'The answer is 18' -> 1
'The answer is 1800\\n\\nShe sold' -> 180
'The answer is 5' -> [invalid]"
[ "$seen" = "$expected" ] || { echo "changed: expected $expected" >&2; exit 1; }
