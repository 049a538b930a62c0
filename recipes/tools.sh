#!/usr/bin/env bash
# The quickstart with a tool: the tiny model learns to call a calculator, on two CPU cores (10 minutes of training on slow ones):
#   bash recipes/tools.sh [overrides] [--dry-run]     e.g. method=grpo trainer.total_training_steps=20
# Sets up .venv, makes the model and sums of three numbers up to 99, warms the model up, trains, validates, plots.
# ASSETS (folder of model and data) and SEED (of task, warm-up and training) may be set in the environment.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
for word in "$@"; do
  case $word in
    -h | --help) sed -n '2,5s/^# *//p' "$0" && exit ;;
  esac
done
export ASSETS=${ASSETS:-runs/tools-assets-${SEED:-0}} CPPO_QUICKSTART_FLAGS="--calculator --terms 3 --operand-max 99"
exec bash "$root/recipes/quickstart.sh" recipe=tools \
  "actor_rollout_ref.rollout.multi_turn.function_tool_path='$root/recipes/calculator.py'" "$@"
