#!/usr/bin/env bash
# From nothing to a model trained with CPPO, on two CPU cores in about 5 minutes (20 on a slow machine):
#   bash recipes/quickstart.sh [overrides] [--dry-run]     e.g. method=grpo trainer.total_training_steps=20
# Sets up .venv, makes a tiny Qwen3 and an arithmetic data set, warms the model up, trains, validates, plots.
# ASSETS (folder of model and data) and SEED (of task, warm-up and training) may be set in the environment.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry=""
for word in "$@"; do
  case $word in
    -h | --help) sed -n '2,5s/^# *//p' "$0" && exit ;;
    --dry-run) dry=1 ;;
  esac
done
"$root/scripts/setup.sh"
bin=${VENV:-$root/.venv}/bin

seed=${SEED:-0}
assets=${ASSETS:-runs/quickstart-assets-$seed}
settings=(
  recipe=quickstart
  "quickstart.assets='$(realpath -ms "$assets")'"
  run.seed="$seed"
)
if [[ ! $dry ]]; then
  # shellcheck disable=SC2206 # several flags: recipes/tools.sh has another task
  build=("$bin/python" -m cppo_verl.quickstart --out "$assets" --seed "$seed" ${CPPO_QUICKSTART_FLAGS:-})
  if ! "${build[@]}" --is-built 2>/dev/null; then
    # A mistyped setting is told before the warm-up, not after it.
    checked=$("$bin/cppo" train "${settings[@]}" "$@" --dry-run 2>&1 >/dev/null) || { echo "$checked" >&2 && exit 2; }
    "${build[@]}"
  fi
fi
exec "$bin/cppo" train "${settings[@]}" "$@"
