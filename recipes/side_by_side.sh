#!/usr/bin/env bash
# CPPO and GRPO of this project, stock verl's GRPO and TRL's GRPOTrainer on the quickstart's task, one after the other:
#   bash recipes/side_by_side.sh FOLDER     three times four trainings on two CPU cores; given again, it goes on
# Writes side_by_side.jsonl, versions.json, a table (side_by_side.md) and a plot (side_by_side.svg) into FOLDER.
# SEED (0; of the first repeat), REPEATS (3) and STEPS (10) may be set in the environment; TRL_VENV chooses the folder of
# TRL's own Python environment (.venv-trl), VENV that of everything else. CPUs only.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ $# != 1 || $1 == -* ]]; then
  sed -n '2,6s/^# *//p' "$0"
  if [[ ${1:-} == -h || ${1:-} == --help ]]; then exit 0; else exit 2; fi
fi
"$root/scripts/setup.sh" cpu
python=${VENV:-$root/.venv}/bin/python

trl=${TRL_VENV:-$root/.venv-trl}
requirements=$root/scripts/side_by_side/requirements.txt
if ! cmp -s "$requirements" "$trl/.complete"; then
  echo "TRL's environment in $trl"
  "$python" -m venv "$trl"
  pip=("$trl/bin/python" -m pip --disable-pip-version-check install --quiet)
  torch=torch==2.13.0+cpu
  "${pip[@]}" "$torch" || "${pip[@]}" "$torch" --extra-index-url "${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}"
  "${pip[@]}" "$torch" -r "$requirements"
  cp "$requirements" "$trl/.complete"
fi

status=0
"$python" "$root/scripts/side_by_side/run_arms.py" "$1" --seed "${SEED:-0}" --repeats "${REPEATS:-3}" \
  --steps "${STEPS:-10}" --trl-python "$trl/bin/python" || status=$?
"$python" "$root/scripts/side_by_side/report.py" "$1"
exit $status
