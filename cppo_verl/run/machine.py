"""Facts of this machine: what computes here, and whether a run leaves it for a cluster."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# Where processes of one machine share arrays; Docker's default of 64 MiB holds none of vLLM's or Ray's.
SHARED_MEMORY, LEAST_SHARED_MEMORY = "/dev/shm", 256 * 2**20

# vLLM's executor whose worker is in the engine's process. On a CPU vLLM would give it one of its own, for the sake of
# threads, which VLLM_CPU_OMP_THREADS_BIND=nobind settles; that is a message and its answer at every token.
ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"

# Ray's word for a Ray that is yet to be started on this machine.
OWN_RAY = "local"


def joined_cluster(address: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """Address of the running Ray cluster that a run joins, by its setting or RAY_ADDRESS; None: a Ray of its own."""
    found = address or environment.get("RAY_ADDRESS")
    return None if not found or found == OWN_RAY else found


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU, without importing torch."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists()


def gpus() -> list[str]:
    """Name and memory of each, by nvidia-smi."""
    names = output_of("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    return names.splitlines() if names else []


def cpu_name() -> str:
    """As the kernel calls it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def output_of(*command: str, folder: Path | None = None) -> str | None:
    """What a short command prints; None where it fails, is absent or takes 20 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=folder)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def memory(group: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """(total, available) bytes of the machine, or of the container where that has less."""
    import psutil

    whole = psutil.virtual_memory()
    limit = (group / "memory.max").read_text().strip() if (group / "memory.max").is_file() else "max"
    if not limit.isdigit() or int(limit) >= whole.total:
        return whole.total, whole.available
    used = int((group / "memory.current").read_text())
    cache = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
    return int(limit), min(whole.available, int(limit) - used + (int(cache[1]) if cache else 0))
