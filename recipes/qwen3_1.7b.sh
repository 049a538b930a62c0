#!/usr/bin/env bash
# Qwen3-1.7B (post-trained) as in the paper (Table 3): configs/recipe/qwen3_1.7b.yaml
#   bash recipes/qwen3_1.7b.sh [method=dppo divergence=binary_tv trainer.nnodes=2 ...] [--dry-run]
# GPUs: 8 of 80 GB. Hours: not known. Run here: no (composed and checked by a test).
# The paper's AIME24/25/26 Avg@16, best of 1120 steps: CPPO 31.88, DPPO 28.19, GRPO 27.91.
# Data: scripts/prepare_data.sh.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../scripts/cppo.sh" train platform=gpu recipe=qwen3_1.7b "$@"
