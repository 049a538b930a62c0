#!/usr/bin/env bash
# Make the documentation site: scripts/site.sh [folder, default site/]. Fails on a link that leads nowhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
NO_MKDOCS_2_WARNING=1 "${VENV:-.venv}/bin/mkdocs" build -f .mkdocs.yml -d "$(realpath -m "${1:-site}")"
echo "${1:-site}/index.html"
