#!/usr/bin/env bash
# outlines 1.3.3 (outlines_core 0.2.14): of Literal["1", "10", "100"] only 1 can be written; longest first, all.
#
# A choice becomes the regex (1|10|100), and its index keeps what a search from left to right would find first: behind the
# 1 the other options are gone. The same holds for an enum of numbers in a JSON schema, and a lazy quantifier allows its
# fewest repetitions only. Python's re matches every option in whole. Strings of a JSON enum are safe, since a quote ends
# each. All texts that the index lets a vocabulary of single characters write. Seen:
#
#   Literal["1", "10", "100"]: ['1']
#   Literal["100", "10", "1"]: ['1', '10', '100']
#   Literal["cat", "cats"]: ['cat']
#   JSON enum [1, 10, 100]: ['1']
#   JSON enum ["1", "10", "100"]: ['"1"', '"10"', '"100"']
#   Regex a{1,3}: ['a', 'aa', 'aaa']
#   Regex a{1,3}?: ['a']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check outlines==1.3.3 outlines_core==0.2.14 2>/dev/null
cat >"$folder/probe.py" <<'PYTHON'
from typing import Literal

from outlines.types import JsonSchema, Regex
from outlines.types.dsl import python_types_to_terms, to_regex
from outlines_core import Index, Vocabulary

letters = '01acst"'
vocabulary = Vocabulary(len(letters), {letter: [token] for token, letter in enumerate(letters)})
kinds = {
    'Literal["1", "10", "100"]': Literal["1", "10", "100"],
    'Literal["100", "10", "1"]': Literal["100", "10", "1"],
    'Literal["cat", "cats"]': Literal["cat", "cats"],
    "JSON enum [1, 10, 100]": JsonSchema('{"enum": [1, 10, 100]}'),
    'JSON enum ["1", "10", "100"]': JsonSchema('{"enum": ["1", "10", "100"]}'),
    "Regex a{1,3}": Regex("a{1,3}"),
    "Regex a{1,3}?": Regex("a{1,3}?"),
}
for name, kind in kinds.items():
    index = Index(to_regex(python_types_to_terms(kind)), vocabulary)
    moves, texts = index.get_transitions(), []
    paths = [(index.get_initial_state(), "")]
    while paths:
        state, text = paths.pop()
        if state in index.get_final_states():
            texts.append(text)
        paths += [(after, text + letters[token]) for token, after in moves.get(state, {}).items() if token < len(letters)]
    print(f"{name}: {sorted(texts)}")
PYTHON
seen=$("$folder/venv/bin/python" "$folder/probe.py" 2>/dev/null)
echo "$seen"
expected="Literal[\"1\", \"10\", \"100\"]: ['1']
Literal[\"100\", \"10\", \"1\"]: ['1', '10', '100']
Literal[\"cat\", \"cats\"]: ['cat']
JSON enum [1, 10, 100]: ['1']
JSON enum [\"1\", \"10\", \"100\"]: ['\"1\"', '\"10\"', '\"100\"']
Regex a{1,3}: ['a', 'aa', 'aaa']
Regex a{1,3}?: ['a']"
[ "$seen" = "$expected" ] || { echo "changed: expected $expected" >&2; exit 1; }
