#!/usr/bin/env bash
# Table 1 in small, where rollouts are stale: every method on the quickstart's task, several seeds, on CPU cores.
#   bash recipes/toy_table1.sh FOLDER [options]     given again, it goes on; e.g. --rows ablations --seeds 0 1 2
# Options: --rows, --seeds, --lr, --staleness, --on, --steps, --workers; each is explained by FOLDER --help.
# Makes task and warm-started model of each seed, trains a cell a core at a time (docs/toy_table.md has times), and writes
# toy_table.jsonl and toy_table.md into FOLDER, where each cell is a run folder for cppo table, plot, overlap, inspect.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ $# == 0 || $1 == -* ]]; then
  sed -n '2,6s/^# *//p' "$0"
  if [[ ${1:-} == -h || ${1:-} == --help ]]; then exit 0; else exit 2; fi
fi
"$root/scripts/setup.sh" cpu >&2
exec "${VENV:-$root/.venv}/bin/python" "$root/scripts/toy_table/train_cells.py" "$@"
