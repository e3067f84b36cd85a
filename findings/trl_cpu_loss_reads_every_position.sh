#!/usr/bin/env bash
# TRL 1.16.0: on a CPU, SFTTrainer's loss reads the output layer at every position, prompts and padding included, and twice.
#
# The loss of SFTTrainer ("nll") projects hidden states onto the vocabulary in tiles and never holds all logits. Where Triton
# runs, it first drops the positions whose label is -100. On any other device, CPUs included, it keeps them, for the sake of
# devices that compile for each shape, and masks their results. So labels on 4 of 64 tokens cost as much as on all of them;
# and as tiles are computed again in the backward pass, the output layer costs 4/3 of what a plain model's does. With
# SmolLM2-135M, whose vocabulary is a fifth of its weights, and labels on a quarter of the tokens, a step on one core took 1.3
# times that of a Trainer whose batch asks for the logits of the labelled positions (logits_to_keep). Seen with transformers
# 5.24.0 and torch 2.13.0 on a CPU, a small random Llama, matrix products of the output layer in a forward and backward pass,
# in units of one product of all positions (of 64 positions 63 have a label behind them):
#
#   SFTTrainer, 64 of 64 tokens labelled: 3.94
#   SFTTrainer, 4 of 64 tokens labelled: 3.94
#   Trainer with logits_to_keep=5, 4 of 64 tokens labelled: 0.23
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 trl==1.16.0 2>/dev/null
cat >"$folder/probe.py" <<'PYTHON'
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

ROWS, TOKENS, WIDTH, VOCAB = 4, 64, 32, 8192
words = {f"w{i}": i for i in range(VOCAB)}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), eos_token="w2", pad_token="w0")
shape = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=False, **shape))
ids = torch.randint(3, VOCAB, (ROWS, TOKENS))


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products of which a side has over a thousand columns or rows: the output layer's."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            a, b = arguments[-2:]
            if max(*a.shape, *b.shape) > 1000:
                self.total += a.shape[0] * a.shape[1] * b.shape[1]
        return function(*arguments, **(options or {}))


def products(trainer: Trainer, batch: dict) -> float:
    with Products() as counted:
        trainer.compute_loss(trainer.model, dict(batch)).backward()
    return counted.total / (ROWS * TOKENS * WIDTH * VOCAB)


options = {"output_dir": sys.argv[1], "report_to": "none", "use_cpu": True, "disable_tqdm": True}
for labelled in (64, 4):
    labels = ids.clone()
    labels[:, : TOKENS - labelled] = -100
    rows = Dataset.from_list([{"input_ids": a, "labels": b} for a, b in zip(ids.tolist(), labels.tolist(), strict=True)])
    sft = SFTTrainer(model, SFTConfig(**options, max_length=None), train_dataset=rows, processing_class=tokenizer)
    (batch,) = [sft.data_collator([*rows])]
    print(f"SFTTrainer, {labelled} of {TOKENS} tokens labelled: {products(sft, batch):.2f}")
model = LlamaForCausalLM(model.config)
batch = {"input_ids": ids, "labels": labels[:, -5:], "logits_to_keep": 5}
print(f"Trainer with logits_to_keep=5, 4 of {TOKENS} tokens labelled: {products(Trainer(model, TrainingArguments(**options)), batch):.2f}")
PYTHON
seen=$(HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/probe.py" "$folder" 2>/dev/null | grep labelled)
echo "$seen"
expected="SFTTrainer, 64 of 64 tokens labelled: 3.94
SFTTrainer, 4 of 64 tokens labelled: 3.94
Trainer with logits_to_keep=5, 4 of 64 tokens labelled: 0.23"
[ "$seen" = "$expected" ] || { echo "changed: expected $expected" >&2; exit 1; }
