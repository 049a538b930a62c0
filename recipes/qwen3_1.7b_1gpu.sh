#!/usr/bin/env bash
# Qwen3-1.7B-Base on one card, smaller than the paper's: configs/recipe/qwen3_1.7b_1gpu.yaml
#   bash recipes/qwen3_1.7b_1gpu.sh [method=dppo divergence=binary_tv trainer.nnodes=2 ...] [--dry-run]
# GPUs: 1 of 80 GB. Hours: not known. Run here: a few steps, shortened, with random weights (docs/gpu.md).
# Not the paper's run: half the prompts, half the response length. No score is known.
# Data: scripts/prepare_data.sh.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../scripts/cppo.sh" train platform=gpu recipe=qwen3_1.7b_1gpu "$@"
