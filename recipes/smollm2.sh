#!/usr/bin/env bash
# A real language model on two CPU cores: SmolLM2-135M-Instruct, trained with CPPO on worded sums (docs/smollm2.md has times):
#   bash recipes/smollm2.sh [overrides] [--dry-run]     e.g. method=grpo; run.name=a run.resume=auto goes on where a run stopped
# Sets up .venv, fetches the model (93 MB) and converts it, makes the sums, warms the model up, trains, validates, plots.
# ASSETS (folder of model and data), SEED (of task, warm-up and training) and CPPO_SMOLLM2_FLAGS (of python -m cppo_verl.smollm2)
# may be set in the environment.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry=""
for word in "$@"; do
  case $word in
    -h | --help) sed -n '2,6s/^# *//p' "$0" && exit ;;
    --dry-run) dry=1 ;;
  esac
done
"$root/scripts/setup.sh"
bin=${VENV:-$root/.venv}/bin

seed=${SEED:-0}
assets=${ASSETS:-runs/smollm2-assets-$seed}
settings=(
  recipe=smollm2
  "smollm2.assets='$(realpath -ms "$assets")'"
  run.seed="$seed"
)
if [[ ! $dry ]]; then
  # A mistyped setting is told before the download, not after it.
  checked=$("$bin/cppo" train "${settings[@]}" "$@" --dry-run 2>&1 >/dev/null) || { echo "$checked" >&2 && exit 2; }
  # transformers reads the model's file with it; nothing else here needs it.
  lock=$root/scripts/requirements/gguf.lock
  if ! "$bin/python" -c "import gguf" 2>/dev/null; then
    "$bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes -r "$lock" ||
      { echo "recipes/smollm2.sh: pip cannot install $lock; give the same command again with a network" >&2 && exit 1; }
  fi
  # shellcheck disable=SC2086 # several flags
  "$bin/python" -m cppo_verl.smollm2 --out "$assets" --seed "$seed" ${CPPO_SMOLLM2_FLAGS:-}
fi
exec "$bin/cppo" train "${settings[@]}" "$@"
