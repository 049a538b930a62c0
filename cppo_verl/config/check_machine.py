"""Whether the folders that Ray and vLLM write to can hold what they write; what they say themselves hides it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from cppo_verl.problems import Problem
from cppo_verl.run.machine import LEAST_SHARED_MEMORY, SHARED_MEMORY, joined_cluster

_MIB = 2**20
# Bytes of sockets, logs and compiled code of the smallest run, with a little to spare.
_LEAST_TEMPORARY = 256 * _MIB


def check_machine(config: DictConfig) -> Iterator[Problem]:
    """Of a Ray of the run's own; the nodes of a cluster that is running have theirs."""
    if joined_cluster(config.ray_kwargs.ray_init.get("address")) is None:
        yield from check_shared_memory()
        yield from check_temporary()


def check_shared_memory() -> Iterator[Problem]:
    """A write beyond its end is a bus error in the process that makes it, without a message."""
    if not Path(SHARED_MEMORY).is_dir():
        return
    usage = shutil.disk_usage(SHARED_MEMORY)
    for what, size in (("in all", usage.total), ("free", usage.free)):
        if size < LEAST_SHARED_MEMORY:
            yield Problem(
                SHARED_MEMORY,
                f"{SHARED_MEMORY}: {size // _MIB} MiB {what}, and vLLM and Ray take {LEAST_SHARED_MEMORY // _MIB} or "
                f"more: docker run --shm-size=8g (or --ipc=host); elsewhere: mount -o remount,size=8g {SHARED_MEMORY}, "
                "or delete what ended programs have left there",
                only_here=True,
            )
            return


def check_temporary() -> Iterator[Problem]:
    """TMPDIR, in which compiled code is stored and loaded from, and Ray's folder."""
    chosen = os.environ.get("TMPDIR")
    if chosen and not (os.path.isdir(chosen) and os.access(chosen, os.W_OK | os.X_OK)):
        yield _problem("TMPDIR", chosen, "no folder that can be written")
        return
    folder = chosen or tempfile.gettempdir()
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        yield _problem("TMPDIR", folder, "mounted noexec, and compiled code is loaded from there")
    ray = os.environ.get("RAY_TMPDIR")
    for name, place in (("TMPDIR", folder), ("RAY_TMPDIR", ray)):
        if place and os.path.isdir(place) and (free := shutil.disk_usage(place).free) < _LEAST_TEMPORARY:
            what = f"{free // _MIB} MiB free, and a run takes {_LEAST_TEMPORARY // _MIB} or more"
            yield _problem(name, place, what, "make room, or ")


def _problem(name: str, folder: str, what: str, remedy: str = "") -> Problem:
    return Problem(name, f"{name}={folder}: {what}; {remedy}set {name}=/a/short/path/elsewhere", only_here=True)
