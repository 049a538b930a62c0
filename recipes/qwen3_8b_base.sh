#!/usr/bin/env bash
# Qwen3-8B-Base as in the paper (Table 3), with FSDP2: configs/recipe/qwen3_8b_base.yaml
#   bash recipes/qwen3_8b_base.sh [method=dppo divergence=binary_tv trainer.nnodes=2 ...] [--dry-run]
# GPUs: 8 of 80 GB. Hours: not known. Run here: no (composed and checked by a test).
# The paper's AIME24/25/26 Avg@16, best of 490 steps: CPPO 31.11, DPPO 28.89, GRPO 23.96.
# Data: scripts/prepare_data.sh.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../scripts/cppo.sh" train platform=gpu recipe=qwen3_8b_base "$@"
