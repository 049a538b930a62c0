#!/usr/bin/env bash
# A recipe as a job of a running Ray cluster: uploads this checkout, so that every node runs its cppo_verl (docs/cluster.md).
#   RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265 recipes/cluster/ray_submit.sh FOLDER recipes/qwen3_8b_base.sh run.name=NAME [overrides]
# FOLDER, which every node sees, holds data/ and gets runs/. NO_WAIT=1: return after submitting. VENV: where `ray` is looked for first.
set -euo pipefail
if (($# < 2)); then
  sed -n '3,4s/^# *//p' "$0" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=$1 recipe=$2
ray=${VENV:-$root/.venv}/bin/ray
if [[ ! -x $ray ]]; then ray=ray; fi

# Ray leaves out what .gitignore names, .git and .venv. Its own limit for `ray job stop` is 3 s, too short for a run to end in order;
# without the second variable it refuses a run that sends along a variable which the job has too.
environment='{"excludes": ["/docs", "/tests"], "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120", "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1"}}'
# In the folder, not in Ray's copy of the checkout, which is deleted with the job.
inside='recipe=$PWD/$1 && cd "$0" && shift && exec bash "$recipe" run.resume=auto "$@"'
exec "$ray" job submit --working-dir "$root" --runtime-env-json "$environment" ${NO_WAIT:+--no-wait} -- bash -c "$inside" "$folder" "$recipe" "${@:3}"
