"""What has ended a run, where the exception that it ended by only says that something else has: found in its log."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_COLOUR = re.compile(r"\x1b\[[\d;]*m")
# Before every line of a worker: Ray's "(TaskRunner pid=123)", vLLM's own, vLLM's "ERROR 11-25 10:00:00 [core.py:7] ".
_PREFIX = re.compile(r"^(?:\([^)]*\)\s*)*(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*:\d+\] ?)?")
_EXCEPTION = re.compile(r"^((?!ray\.exceptions\.RayTaskError)[\w.]*(?:Error|Exception): \S.{0,300})$")

# Exceptions that pass on what another process has raised, or that it is gone.
_FOLLOWING = re.compile(
    r"EngineDeadError|EngineCore encountered an issue|Engine core initialization failed|"
    r"WorkerProc initialization failed|Worker failed with error|Executor failed|ActorDiedError|ActorUnavailableError|"
    r"WorkerCrashedError|RayTaskError|The actor died|died unexpectedly|The current node timed out during startup"
)


class _Cause(NamedTuple):
    pattern: re.Pattern[str]
    sentence: str
    """"{}" takes what the pattern's group has found."""


_MEMORY = "give the run more memory, or less to do (docs/troubleshooting.md, Memory)"
_SHARED = r"(?:/dev/shm|psm_|</?torch_)"
_CAUSES = tuple(
    _Cause(re.compile(pattern), sentence)
    for pattern, sentence in (
        (
            r"killed due to the node running low on memory|ray\.exceptions\.OutOfMemoryError",
            f"Ray ended a worker because the memory of its machine was nearly full; {_MEMORY}",
        ),
        (
            rf"{_SHARED}.*(?:No space left|Cannot allocate)|No space left.*{_SHARED}|unable to allocate shared memory|"
            r"Error while creating shared memory segment|exceeds /dev/shm size|[Bb]us error|SIGBUS",
            "/dev/shm is full or too small; docker run --shm-size=8g (or --ipc=host), elsewhere: "
            "mount -o remount,size=8g /dev/shm",
        ),
        (
            r"(\S+): failed to map segment from shared object",
            "{}: code cannot be loaded from there, its file system is mounted noexec; set TMPDIR=/a/path/elsewhere",
        ),
        (
            r"No space left on device(?:: '([^']+)')?|OutOfDiskError",
            "the disk {}is full; make room, or set TMPDIR and RAY_TMPDIR to another one",
        ),
        (
            r"((?:torch\.(?:cuda\.)?)?OutOfMemoryError: CUDA out of memory.{0,160})",
            "{}: see docs/troubleshooting.md, Memory",
        ),
        (
            r"DefaultCPUAllocator: (?:can't allocate|not enough) memory|^MemoryError|Cannot allocate memory",
            f"the memory of the machine is used up; {_MEMORY}",
        ),
        (
            r"The current node timed out during startup",
            "Ray's helper processes were not up within its 15 seconds, as where other programs keep every core busy; "
            "end those, or start again when the machine has room",
        ),
        (
            r"Failed core proc\(s\): \{[^}]*: -9\b",
            f"vLLM's engine was killed (SIGKILL), as the kernel does where memory runs out (see dmesg); {_MEMORY}",
        ),
    )
)


def plain_lines(log: Path) -> Iterator[str]:
    """The log's lines without colours, and without what Ray and vLLM put before them."""
    if log.exists():
        with open(log, errors="replace") as file:
            for line in file:
                yield _PREFIX.sub("", _COLOUR.sub("", line.rstrip("\n")))


def known_cause(lines: Iterable[str]) -> str | None:
    """A sentence about the first line that names a cause of those that we know; None where none does."""
    for line in lines:
        for pattern, sentence in _CAUSES:
            if match := pattern.search(line):
                found = next((group for group in match.groups() if group), "")
                return sentence.format(f"of {found} " if found and "disk" in sentence else found)
    return None


def is_following(error: str) -> bool:
    """Whether the exception only says that another process has failed."""
    return bool(_FOLLOWING.search(error))


def first_errors(log: Path, limit: int = 3, before: str | None = None) -> list[tuple[str, int]]:
    """The first distinct exceptions of a log, whichever process they are of, and how often each occurs.

    The exception that ends a run is often only what a worker's first one led to; those that only say so come last.

    Args:
        before: a line with this text, the run's last exception, ends the search: what follows is its end's own noise.
    """
    counts: dict[str, int] = {}
    lines = plain_lines(log)
    for line in lines:
        if before and before in line:
            break
        if match := _EXCEPTION.match(line):
            error = match[1]
            if error.startswith("ray.exceptions.Actor"):  # which one stands in the next line
                error += f" ({next(lines, '').strip()})"
            counts[error] = counts.get(error, 0) + 1
    return sorted(counts.items(), key=lambda entry: is_following(entry[0]))[:limit]
