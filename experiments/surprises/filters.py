"""lm-evaluation-harness' filters and exact match for GSM8K against our grader, on solutions in predictions.jsonl.

python -m experiments.surprises.filters RESULTS/predictions.jsonl ...; needs lm_eval
"""

import json
import sys
from collections import Counter
from pathlib import Path

import lm_eval
import yaml
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters import build_filter_ensemble

from llm2.tasks.grading import extract_answer, is_correct

task = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
options = {key: value for key, value in task["metric_list"][0].items() if key.startswith(("ignore", "regexes"))}
filters = {
    each["name"]: [[f["function"], {k: v for k, v in f.items() if k != "function"}] for f in each["filter"]]
    for each in task["filter_list"]
}


class Instance:
    def __init__(self, text):
        self.resps, self.doc, self.filtered_resps = [text], {}, {}


rows = [json.loads(line) for path in sys.argv[1:] for line in Path(path).read_text().splitlines()]
pairs = [(sample["text"], row["gold"]) for row in rows for sample in row["samples"]]
instances = [Instance(text) for text, _ in pairs]
for name, steps in filters.items():
    build_filter_ensemble(name, steps).apply(instances)
for name, mode in (("flexible-extract", "flexible"), ("strict-match", "strict")):
    counts, examples = Counter(), {}
    for instance, (text, gold) in zip(instances, pairs, strict=True):
        found = instance.filtered_resps[name]
        theirs = bool(exact_match_hf_evaluate([found], [gold], **options)["exact_match"])
        key = (theirs, is_correct(text, gold, mode))
        counts[key] += 1
        if key[0] != key[1] or (mode == "flexible" and found.strip(".") != extract_answer(text)):
            examples.setdefault((*key, extract_answer(text, mode) is None), (text[-70:], gold, found))
    print(f"{name}: n = {len(pairs)}, (theirs, ours): {dict(counts)}")
    for key, example in examples.items():
        print("   ", key, example)
