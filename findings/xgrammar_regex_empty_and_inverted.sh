#!/usr/bin/env bash
# xgrammar 0.2.9: a regex that ends in `[^\n]+` or `.+` lets the text end before it, and `[\^+*/-]` means all but operators.
#
# One or more characters of a negated class, or of `.`, at the end of a regex may be none since 0.2.9: the mask allows the
# end-of-text token where 0.2.8 does not, so that `Answer: .+` lets a model stop after "Answer: ". A class of listed
# characters is right, and so is one with text behind it. In both versions an escaped caret at the beginning of a class
# negates it. 0.2.9 warns of nothing. For each regex, the texts that Python's re accepts and the mask refuses, and the other way
# round. Seen with torch 2.13.0:
#
#   0.2.8
#   '[^\\n]+' right
#   'Answer: .+' right
#   'Answer: [0-9]+' right
#   '[^,]+,[^,]+' right
#   '[+*/^-]' right
#   '[\\^+*/-]' refuses ['+', '*'], accepts ['x', '5']
#   0.2.9
#   '[^\\n]+' accepts ['']
#   'Answer: .+' accepts ['Answer: ']
#   'Answer: [0-9]+' right
#   '[^,]+,[^,]+' accepts ['a,']
#   '[+*/^-]' right
#   '[\\^+*/-]' refuses ['+', '*'], accepts ['x', '5']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat >"$folder/probe.py" <<'PYTHON'
import re
from importlib.metadata import version

import torch
import xgrammar

end = 127  # the tokens are the characters of ASCII, and one that ends the text
letters = xgrammar.TokenizerInfo([bytes([each]) for each in range(end)] + [b"</s>"], stop_token_ids=[end])
compiler = xgrammar.GrammarCompiler(letters)
texts = {
    r"[^\n]+": ["", "a", "\n"],
    r"Answer: .+": ["Answer: ", "Answer: 5"],
    r"Answer: [0-9]+": ["Answer: ", "Answer: 5"],
    r"[^,]+,[^,]+": ["a,", "a,b"],
    r"[+*/^-]": ["+", "*", "^", "x", "5"],
    r"[\^+*/-]": ["+", "*", "^", "x", "5"],
}


def accepts(regex: str, text: str) -> bool:
    matcher = xgrammar.GrammarMatcher(compiler.compile_regex(regex))
    for token in [*text.encode(), end]:
        mask, logits = xgrammar.allocate_token_bitmask(1, end + 1), torch.zeros(1, end + 1)
        matcher.fill_next_token_bitmask(mask)
        xgrammar.apply_token_bitmask_inplace(logits, mask)
        if logits[0, token] != 0 or not matcher.accept_token(token):
            return False
    return True


print(version("xgrammar"))
for regex, each in texts.items():
    right = {text for text in each if re.fullmatch(regex, text)}
    found = {text for text in each if accepts(regex, text)}
    wrong = {"refuses": sorted(right - found, key=each.index), "accepts": sorted(found - right, key=each.index)}
    print(repr(regex), ", ".join(f"{verb} {which}" for verb, which in wrong.items() if which) or "right")
PYTHON
seen=
for version in 0.2.8 0.2.9; do
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 "xgrammar==$version" 2>/dev/null
  lines=$("$folder/venv/bin/python" "$folder/probe.py" 2>/dev/null)
  echo "$lines"
  seen+=$lines$'\n'
done
expected="0.2.8
'[^\\\\n]+' right
'Answer: .+' right
'Answer: [0-9]+' right
'[^,]+,[^,]+' right
'[+*/^-]' right
'[\\\\^+*/-]' refuses ['+', '*'], accepts ['x', '5']
0.2.9
'[^\\\\n]+' accepts ['']
'Answer: .+' accepts ['Answer: ']
'Answer: [0-9]+' right
'[^,]+,[^,]+' accepts ['a,']
'[+*/^-]' right
'[\\\\^+*/-]' refuses ['+', '*'], accepts ['x', '5']
"
[ "$seen" = "$expected" ] || { echo "changed: expected $expected" >&2; exit 1; }
