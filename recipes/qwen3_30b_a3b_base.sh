#!/usr/bin/env bash
# Qwen3-30B-A3B-Base as in the paper (Table 3), with Megatron: configs/recipe/qwen3_30b_a3b_base.yaml
#   bash recipes/qwen3_30b_a3b_base.sh [method=dppo divergence=binary_tv trainer.nnodes=2 ...] [--dry-run]
# GPUs: 32 of 80 GB in 4 nodes (the paper's number is not public), and verl's image with Megatron-core. Hours: not known. Run here: no (composed and checked by a test).
# The paper's AIME24/25/26 Avg@16, best of 560 steps: CPPO 54.79, DPPO 49.23, GRPO 38.19; CISPO diverged at step 215.
# Data: scripts/prepare_data.sh.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../scripts/cppo.sh" train platform=gpu recipe=qwen3_30b_a3b_base "$@"
