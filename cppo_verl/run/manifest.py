"""What a run was made with: versions, commit, command, hardware. Written into the run folder before it starts."""

import os
import platform
import shlex
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from cppo_verl.run.confidential import redacted
from cppo_verl.run.machine import cpu_name, gpus, output_of

_PACKAGES = ("cppo_verl", "verl", "vllm", "ray", "torch", "transformers", "TransferQueue", "tensordict", "math-verify")


def manifest(command: list[str]) -> dict[str, Any]:
    """A JSON-serialisable record of this machine, these packages, this checkout and ``command``, without secrets."""
    return {
        "command": shlex.join(redacted(command, os.environ)),
        "working_directory": os.getcwd(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "hardware": {
            "machine": platform.node(),
            "system": platform.platform(),
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": gpus(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with "+changes" when tracked files differ; None for an installed wheel."""
    here = Path(__file__).parent
    tracked = output_of("git", "ls-files", "--error-unmatch", os.path.basename(__file__), folder=here)
    commit = output_of("git", "rev-parse", "HEAD", folder=here) if tracked else None
    if commit is None:
        return None
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no", folder=here)
    return commit + ("+changes" if changed else "")
