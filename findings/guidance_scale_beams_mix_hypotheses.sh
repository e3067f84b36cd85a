#!/usr/bin/env bash
# transformers 5.24.0: with guidance_scale, beam search and prompt lookup read other texts' unconditional scores, in silence.
#
# The processor of classifier-free guidance keeps a cache of its own for the unconditional text. Beam search reorders the
# model's cache when hypotheses change places, and prompt lookup takes refused tokens out of it; the processor's cache stays
# as it was, so that a hypothesis is scored with another one's past, or with refused tokens. The score that beam search
# returns is then not that of its text, which is worse than the greedy one; use_cache=False changes nothing. Without
# guidance both are right. Seen with torch 2.13.0 on a CPU, a random Llama of two layers, eight new tokens, sums of log-scores:
#
#   plain beams: returned -8.5, of the text -8.5
#   guided beams: returned 27.8, of the text 12.4; guided greedy text 16.7
#   plain prompt lookup: as greedy
#   guided prompt lookup: 6 tokens as greedy, then others
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 2>/dev/null
cat >"$folder/probe.py" <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, initializer_range=0.3, **shape)).eval()
prompt, new = torch.randint(1, 64, (1, 6)), 8
settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
beams = {"num_beams": 4, "length_penalty": 0.0, "return_dict_in_generate": True, "output_scores": True}


@torch.no_grad()
def guided(ids: torch.Tensor, scale: float) -> torch.Tensor:
    """The scores of the tokens after the prompt; the unconditional text begins at the prompt's last token."""
    start = prompt.shape[1] - 1
    with_prompt = model(ids).logits[0, start:].log_softmax(-1)
    return scale * with_prompt + (1 - scale) * model(ids[:, start:]).logits[0].log_softmax(-1)


def total(ids: torch.Tensor, scale: float) -> float:
    return guided(ids, scale)[:-1].gather(1, ids[0, prompt.shape[1] :, None]).sum().item()


def greedy(scale: float) -> torch.Tensor:
    ids = prompt
    for _ in range(new):
        ids = torch.cat([ids, guided(ids, scale)[-1].argmax().view(1, 1)], 1)
    return ids


for name, scale in (("plain", 1.0), ("guided", 2.0)):
    assert torch.equal(model.generate(prompt, guidance_scale=scale, **settings), greedy(scale))
    found = model.generate(prompt, guidance_scale=scale, **beams, **settings)
    line = f"{name} beams: returned {found.sequences_scores.item():.1f}, of the text {total(found.sequences, scale):.1f}"
    print(line if scale == 1 else f"{line}; guided greedy text {total(greedy(scale), scale):.1f}")
    uncached = model.generate(prompt, guidance_scale=scale, use_cache=False, **beams, **settings)
    assert torch.equal(uncached.sequences, found.sequences)
for name, scale in (("plain", 1.0), ("guided", 2.0)):
    found = model.generate(prompt, guidance_scale=scale, prompt_lookup_num_tokens=3, **settings)
    same = (found == greedy(scale))[0, prompt.shape[1] :].long().cumprod(0).sum().item()
    print(f"{name} prompt lookup: " + ("as greedy" if same == new else f"{same} tokens as greedy, then others"))
PYTHON
seen=$(HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/probe.py" 2>/dev/null)
echo "$seen"
expected="plain beams: returned -8.5, of the text -8.5
guided beams: returned 27.8, of the text 12.4; guided greedy text 16.7
plain prompt lookup: as greedy
guided prompt lookup: 6 tokens as greedy, then others"
[ "$seen" = "$expected" ] || { echo "changed: expected $expected" >&2; exit 1; }
