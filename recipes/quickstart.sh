#!/usr/bin/env bash
# From nothing to a model trained with CPPO, on two CPU cores in about 7 minutes:
#   bash recipes/quickstart.sh [overrides]     e.g. method=grpo trainer.total_training_steps=20
# Sets up .venv, makes a tiny Qwen3 and an arithmetic data set, warms the model up, trains, validates, plots.
# ASSETS (folder of model and data) and SEED (of task, warm-up and training) may be set in the environment.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh"
bin=${VENV:-$root/.venv}/bin

seed=${SEED:-0}
assets=${ASSETS:-runs/quickstart-assets-$seed}

"$bin/python" -m cppo_verl.quickstart --out "$assets" --seed "$seed"

settings=(
  recipe=quickstart
  "quickstart.assets='$(cd "$assets" && pwd)'"
  run.seed="$seed"
)
exec "$bin/cppo" train "${settings[@]}" "$@"
