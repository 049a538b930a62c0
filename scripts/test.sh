#!/usr/bin/env bash
# Set up what is needed and run the tests: scripts/test.sh [pytest arguments]
# Without arguments: style, types and the default tests. "-m slow" runs the long end-to-end tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh ${CPPO_STACK:+"$CPPO_STACK"}
bin=${VENV:-.venv}/bin

# What starts the whole stack or measures time has the machine to itself, after all others, which run two at a time with
# one thread each.
both_parts() { # both_parts marker
  local status=0
  OMP_NUM_THREADS=1 "$bin/python" -m pytest -m "$1 and not alone" -n 2 --dist loadfile || status=$?
  "$bin/python" -m pytest -m "$1 and alone" || status=$?
  exit "$status"
}

if (($# == 0)); then
  "$bin/ruff" check .
  "$bin/ruff" format --check .
  "$bin/mypy"
  both_parts "not slow"
elif [[ $* == "-m slow" ]]; then
  both_parts slow
fi
exec "$bin/python" -m pytest "$@"
