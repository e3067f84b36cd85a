"""Token ids of a GGUF file's texts: ours, and transformers' own tokenizer, against llama.cpp's.

python -m experiments.surprises.gguf_tokens FILE.gguf [QUESTIONS.jsonl ...]; needs xllamacpp. Texts are questions and
answers of the files and 3,000 pieces of torch's and transformers' code, six lines each.
"""

import json
import random
import sys
import urllib.request
from pathlib import Path

import torch
import transformers
import xllamacpp
from transformers import AutoTokenizer

from llm2.common.loading import load_tokenizer

file, random = Path(sys.argv[1]), random.Random(0)
rows = [json.loads(line) for path in sys.argv[2:] for line in Path(path).read_text().splitlines()]
texts = [row[key] for row in rows for key in ("question", "answer")]
texts = random.sample(texts, min(7000, len(texts)))
code = []
for folder in (Path(torch.__file__).parent / "nn" / "modules", Path(transformers.__file__).parent / "generation"):
    for source in sorted(folder.glob("*.py")):
        lines = source.read_text().split("\n")
        code += ["\n".join(lines[start : start + 6]) for start in range(0, len(lines) - 6, 6)]
texts += random.sample(code, 3000)
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel = str(file), 512, 1
server = xllamacpp.Server(settings)


def llama(text, **options):
    body = json.dumps({"content": text, "add_special": False, **options}).encode()
    header = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, header)
    return json.load(urllib.request.urlopen(request))["tokens"]


reference = [llama(text) for text in texts]
loaded = {"ours": load_tokenizer(str(file))}
loaded["transformers"] = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
for name, tokenizer in loaded.items():
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    differ = [a != b for a, b in zip(ids, reference, strict=True)]
    print(f"{name}: {sum(differ[:-3000])} of {len(texts) - 3000} texts and {sum(differ[-3000:])} of 3000 pieces differ")
for text in ("<s>5</s>", "<b>5</b>"):
    print(text, {special: llama(text, parse_special=special) for special in (False, True)})
