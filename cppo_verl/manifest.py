"""What a run was made with: versions, commit, command, hardware. Written into the run folder before it starts."""

import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("cppo_verl", "verl", "vllm", "ray", "torch", "transformers", "TransferQueue", "tensordict", "math-verify")


def manifest(command: list[str]) -> dict[str, Any]:
    """A JSON-serialisable record of this machine, these packages, this checkout and ``command``."""
    return {
        "command": shlex.join(command),
        "working_directory": os.getcwd(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "hardware": {
            "machine": platform.node(),
            "system": platform.platform(),
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": _gpus(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit() -> str | None:
    """The checkout's commit, with "+changes" when tracked files differ; None for an installed wheel."""
    tracked = _run("git", "ls-files", "--error-unmatch", os.path.basename(__file__))
    commit = _run("git", "rev-parse", "HEAD") if tracked else None
    if commit is None:
        return None
    return commit + ("+changes" if _run("git", "status", "--porcelain", "--untracked-files=no") else "")


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _gpus() -> list[str]:
    names = _run("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    return names.splitlines() if names else []
