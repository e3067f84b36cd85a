#!/usr/bin/env bash
# vLLM against our own engine, in process and as a server: rollouts, guidance, evaluation. On a CPU, in a venv of its own.
#
#   bash scripts/test_vllm.sh [pytest arguments]
#
# LLM2_VERIFIER and LLM2_PREFIX_HEAD name trained verifiers of the testbed to use; without them small ones are trained.
set -euo pipefail
source "$(dirname "$0")/setup_vllm.sh"
export HF_HUB_OFFLINE=1
# pyproject.toml's options are for pytest-xdist
python -m pytest -q -o addopts= --noconftest tests/vllm_engines.py tests/vllm_guidance.py "$@"
