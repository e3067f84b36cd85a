#!/usr/bin/env bash
# transformers 5.24.0: with gradient accumulation, Trainer multiplies the loss of most text classifiers, and of T5, by the steps.
#
# Trainer leaves out the division by gradient_accumulation_steps for a model whose forward takes **kwargs, since such a model
# is to divide by the number of labels in all of the batches. Most text classifiers and masked language models take **kwargs
# and do not hand them to their loss. So the same eight examples, in eight batches of one in place of one of eight, give eight
# times the gradient and a logged loss to match: SGD takes eight times the step, and clipping sees eight times the norm.
# AdamW hardly sees the factor. Reported for 5.15 as issue 47688 of huggingface/transformers. Seen with torch 2.13.0 on a CPU,
# small random models, one step of SGD without clipping: loss and change of the weights with eight batches, over those with one:
#
#   LlamaForCausalLM: loss x 1.00, change x 1.00
#   ViTForImageClassification: loss x 1.00, change x 1.00
#   LlamaForSequenceClassification: loss x 8.00, change x 8.00
#   BertForSequenceClassification: loss x 8.00, change x 8.00
#   BertForMaskedLM: loss x 8.00, change x 8.00
#   T5ForConditionalGeneration: loss x 8.00, change x 8.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 2>/dev/null
cat >"$folder/probe.py" <<'PYTHON'
import sys

import torch
import transformers
from transformers import BertConfig, LlamaConfig, T5Config, Trainer, TrainingArguments, ViTConfig

shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
llama = LlamaConfig(vocab_size=64, num_labels=3, pad_token_id=0, **shape)
bert = BertConfig(vocab_size=64, num_labels=3, hidden_dropout_prob=0, attention_probs_dropout_prob=0, **shape)
vit = ViTConfig(image_size=8, patch_size=4, num_labels=3, **shape)
t5 = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0, decoder_start_token_id=0)
models = {
    "LlamaForCausalLM": llama,
    "ViTForImageClassification": vit,
    "LlamaForSequenceClassification": llama,
    "BertForSequenceClassification": bert,
    "BertForMaskedLM": bert,
    "T5ForConditionalGeneration": t5,
}
torch.manual_seed(0)
ids, images, classes = torch.randint(1, 64, (8, 6)), torch.randn(8, 3, 8, 8), torch.arange(8) % 3


def train(name: str, steps: int) -> tuple[float, float]:
    torch.manual_seed(0)
    model = getattr(transformers, name)(models[name])
    before = torch.cat([weight.detach().flatten().clone() for weight in model.parameters()])
    key, inputs = ("pixel_values", images) if "Image" in name else ("input_ids", ids)
    data = [{key: x, "labels": y} for x, y in zip(inputs, classes if "Classification" in name else ids, strict=True)]
    sizes = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps, "max_steps": 1}
    settings = {"optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0, "logging_steps": 1, "save_strategy": "no"}
    arguments = TrainingArguments(sys.argv[1], **sizes, **settings, report_to="none", disable_tqdm=True, use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    after = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    return trainer.state.log_history[0]["loss"], (after - before).norm().item()


for name in models:
    (loss, change), (loss_8, change_8) = train(name, 1), train(name, 8)
    print(f"{name}: loss x {loss_8 / loss:.2f}, change x {change_8 / change:.2f}")
PYTHON
seen=$(HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/probe.py" "$folder" 2>/dev/null | grep " x ")
echo "$seen"
expected="LlamaForCausalLM: loss x 1.00, change x 1.00
ViTForImageClassification: loss x 1.00, change x 1.00
LlamaForSequenceClassification: loss x 8.00, change x 8.00
BertForSequenceClassification: loss x 8.00, change x 8.00
BertForMaskedLM: loss x 8.00, change x 8.00
T5ForConditionalGeneration: loss x 8.00, change x 8.00"
[ "$seen" = "$expected" ] || { echo "changed: expected $expected" >&2; exit 1; }
