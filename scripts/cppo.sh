#!/usr/bin/env bash
# cppo of the environment that setup.sh made (VENV, default .venv), else the one of PATH, as in a container or an uploaded checkout:
#   scripts/cppo.sh COMMAND [...]     e.g. scripts/cppo.sh train --help
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cppo=${VENV:-$root/.venv}/bin/cppo
if [[ ! -x $cppo ]] && ! cppo=$(command -v cppo); then
  echo "cppo is not installed: run scripts/setup.sh (for a --dry-run: scripts/setup.sh cpu)" >&2
  exit 1
fi
exec "$cppo" "$@"
