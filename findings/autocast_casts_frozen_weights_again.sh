#!/usr/bin/env bash
# torch 2.13.0, transformers 5.24.0: requires_grad_(False), which people call to save work, makes `generate` under autocast cast
# every weight anew for each token.
#
# Autocast keeps the 16-bit copy of a weight until its block ends, but only of weights that require gradients. A model as it is
# loaded has all its linear layers cast once for a whole text, also under no_grad; the same model, frozen, casts them for each
# token: here 15 linear layers and 8 tokens. The texts are the same.
# Weights that are loaded in 16 bits need no cast at all.
#
#   linear weights cast for 8 tokens: 15
#   after model.requires_grad_(False): 120
#   the texts are equal: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy 2>/dev/null
cat >"$folder/probe.py" <<'PYTHON'
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=200, tie_word_embeddings=False, **shape)).eval()
shapes = {tuple(layer.weight.shape) for layer in model.modules() if isinstance(layer, nn.Linear)}
prompt = torch.tensor([[5, 6, 7]])


def generate() -> tuple[int, list[int]]:
    """How many linear weights are cast, and the text."""
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.autocast("cpu", torch.bfloat16), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        text = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    casts = [event for event in seen.events() if event.name == "aten::_to_copy"]
    return sum(tuple(event.input_shapes[0]) in shapes for event in casts), text[0].tolist()


count, text = generate()
print("linear weights cast for 8 tokens:", count)
model.requires_grad_(False)
count, frozen_text = generate()
print("after model.requires_grad_(False):", count)
print("the texts are equal:", text == frozen_text)
PYTHON
"$folder/venv/bin/python" "$folder/probe.py" 2>/dev/null | tee "$folder/seen"
diff <(sed -n 's/^#   //p' "$0") "$folder/seen" && echo "torch 2.13.0, transformers 5.24.0: as described"
