#!/usr/bin/env bash
# transformers 5.24.0: continuous batching drops logits processors and custom decoding loops in silence.
#
# `generate(logits_processor=[...])` calls a processor once a token; `generate_batch` takes the same argument among its
# **kwargs and never calls it. `generate(cache_implementation="paged")` leaves for generate_batch before it looks at
# `custom_generate`, so that a recipe that ought to run is not called either. Neither says a word about it. Seen with torch
# 2.13.0 on a CPU, a random Llama of two layers, five new tokens:
#
#   generate: processor called 5 times
#   generate_batch: processor called 0 times
#   generate, paged: custom_generate called 0 times
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 psutil==7.2.2 2>/dev/null
cat >"$folder/probe.py" <<'PYTHON'
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessor

torch.manual_seed(0)
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **shape)).eval()
settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
ids = torch.tensor([[5, 6, 7, 8]])
calls = 0


class Counter(LogitsProcessor):
    def __call__(self, input_ids, scores):
        global calls
        calls += 1
        return scores


def recipe(model, input_ids, **options):
    global calls
    calls += 1
    return input_ids


model.generate(ids, logits_processor=[Counter()], **settings)
print(f"generate: processor called {calls} times")
calls = 0
config, cache = GenerationConfig(**settings), ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
model.generate_batch(ids.tolist(), config, cache, logits_processor=[Counter()])
print(f"generate_batch: processor called {calls} times")
calls = 0
model.generate(ids, cache_implementation="paged", custom_generate=recipe, **settings)
print(f"generate, paged: custom_generate called {calls} times")
PYTHON
seen=$(HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/probe.py" 2>/dev/null)
echo "$seen"
expected="generate: processor called 5 times
generate_batch: processor called 0 times
generate, paged: custom_generate called 0 times"
[ "$seen" = "$expected" ] || { echo "changed: expected $expected" >&2; exit 1; }
