#!/usr/bin/env bash
# torch 2.13.0: one call of torch.compile turns off the validation of all torch.distributions, for the whole process.
#
# Dynamo sets Distribution.set_default_validate_args(False) when it is first set up, which a call of torch.compile does, on
# any function, without running it. From then on a negative scale is accepted and its log-probability is NaN; distributions
# that are made elsewhere in the process, by other libraries too, are not checked either. Transformers 5.24.0 builds one in
# Gemma 3n's forward; there the check reads a value, so that the model's forward on the `meta` device fails before and runs
# after an unrelated torch.compile. Seen on a CPU:
#
#   before: refused, ValueError
#   after torch.compile was called: accepted, log_prob nan
#   Gemma 3n on meta, before: RuntimeError
#   Gemma 3n on meta, after: runs
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 2>/dev/null
cat >"$folder/probe.py" <<'PYTHON'
import torch
from transformers import Gemma3nTextConfig, Gemma3nTextModel

sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
small = {"vocab_size": 64, "vocab_size_per_layer_input": 64, "intermediate_size": [32, 32], "num_kv_shared_layers": 0}
kinds = {"layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.95, 0.0]}


def normal() -> str:
    try:
        return f"accepted, log_prob {torch.distributions.Normal(0.0, -1.0).log_prob(torch.tensor(0.0)).item()}"
    except ValueError:
        return "refused, ValueError"


def gemma() -> str:
    try:
        with torch.device("meta"), torch.inference_mode():
            config = Gemma3nTextConfig(**sizes, **small, **kinds, hidden_size_per_layer_input=8, laurel_rank=4)
            config._attn_implementation = "eager"
            ids = torch.zeros(1, 4, dtype=torch.long)
            Gemma3nTextModel(config).eval()(ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return "runs"
    except RuntimeError as error:
        return type(error).__name__


first = normal(), gemma()
torch.compile(lambda x: x + 1)
print(f"before: {first[0]}")
print(f"after torch.compile was called: {normal()}")
print(f"Gemma 3n on meta, before: {first[1]}")
print(f"Gemma 3n on meta, after: {gemma()}")
PYTHON
seen=$(HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/probe.py" 2>/dev/null)
echo "$seen"
expected="before: refused, ValueError
after torch.compile was called: accepted, log_prob nan
Gemma 3n on meta, before: RuntimeError
Gemma 3n on meta, after: runs"
[ "$seen" = "$expected" ] || { echo "changed: expected $expected" >&2; exit 1; }
