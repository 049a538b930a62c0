#!/usr/bin/env bash
# The paper's data: DAPO-Math-17k for training, AIME24/25/26 and MATH-500 for evaluation, into data/ (cppo prepare --help).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec bash scripts/cppo.sh prepare "$@"
