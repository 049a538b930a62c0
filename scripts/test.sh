#!/usr/bin/env bash
# Set up what is needed and run the tests: scripts/test.sh [pytest arguments]
# Without arguments: style, types and the default tests. "-m slow" runs the long end-to-end tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh ${CPPO_STACK:+"$CPPO_STACK"}
bin=${VENV:-.venv}/bin
if (($# == 0)); then
  "$bin/ruff" check .
  "$bin/ruff" format --check .
  "$bin/mypy"
  set -- -m "not slow"
fi
exec "$bin/python" -m pytest "$@"
