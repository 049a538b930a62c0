"""Starts a process of ours, follows what it writes, and leaves nothing of it running, however it ends."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

import psutil

from cppo_verl.run import lifeline
from cppo_verl.run.log import EVENTS
from cppo_verl.run.terminal import warn

# Every process of a run inherits this variable; what still carries it after the run is the run's own leftover.
RUN_TAG = "CPPO_RUN_TAG"

# Of the folder that a process writes; carried by all that it starts.
RUN_FOLDER = "CPPO_RUN_FOLDER"

# Exit status of a run that was interrupted (the shell's for SIGINT).
INTERRUPTED = 130

# Defaults for the environment of a run; what the user has set wins.
_ENVIRONMENT = {
    "HYDRA_FULL_ERROR": "1",
    "PYTHONUNBUFFERED": "1",
    "RAY_DEDUP_LOGS": "0",
    # A Ray job and the run in it may name the same variable: without this Ray refuses that.
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
}
_CPU_ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    "OMP_NUM_THREADS": str(os.cpu_count() or 1),
    # Rollout and training share the cores in turn: threads that spin while they wait take them from the other.
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TQ_NUM_THREADS": "2",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class Display(AbstractContextManager[Any], Protocol):
    """Where :func:`supervise` shows what goes on."""

    def event(self, event: Mapping[str, Any]) -> None:
        """A new line of events.jsonl."""

    def line(self, line: Mapping[str, Any]) -> None:
        """A new line of the other file that is followed."""

    def refresh(self) -> None:
        """Called several times a second."""

    def interrupted(self) -> None:
        """Ctrl-C, or a polite kill: the end begins."""


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Make ``folder`` and hold it for this process; False, after a message, where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        warn(f"cppo: {folder} cannot be written: {error}; choose another folder")
        yield False
        return
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            warn(f"cppo: {folder} is still going on in another process")
            yield False
            return
        yield True


def supervise(
    module: str, folder: Path, log_file: Path, environment: dict[str, str], lines: Path, display: Display
) -> int:
    """Run ``python -m module folder`` to its end and leave nothing of it running; returns its exit status.

    Args:
        lines: a JSON-lines file that the process appends to, shown beside the folder's events.
    """
    tag = uuid.uuid4().hex
    process = None
    with _termination_as_interrupt(), open(log_file, "ab") as log:
        try:
            process = start(module, [str(folder)], log, {**environment, RUN_TAG: tag})
            with display:
                status = _follow(process, folder, lines, display)
        except KeyboardInterrupt:
            display.interrupted()
            if process is not None:
                process.send_signal(signal.SIGINT)
            status = INTERRUPTED
        finally:
            end_run(process, tag, patience=15)
    return status


def process_environment(on_cpu: bool, model: str) -> dict[str, str]:
    """What every process that loads ``model`` gets; variables that the user has set win."""
    defaults = {**_ENVIRONMENT, **(_CPU_ENVIRONMENT if on_cpu else {})}
    if Path(model).is_dir():
        # A local model needs no hub; without this, loading it waits for a network that may not be there.
        defaults["HF_HUB_OFFLINE"] = "1"
    return {**defaults, **os.environ}


def start(module: str, arguments: list[str], log: IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """``python -m module arguments``, tied to this process; its output goes to ``log``."""
    command = [sys.executable, "-m", module, *arguments]
    # A session of its own: Ctrl-C reaches the launcher only, which ends the run in order.
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,
        preexec_fn=lifeline.tie,
    )


def _follow(process: subprocess.Popen[bytes], folder: Path, lines: Path, display: Display) -> int:
    """Show events and lines as they are written, until the process ends."""
    events, records = _Tail(folder / EVENTS), _Tail(lines)
    while True:
        ended = process.poll() is not None
        for event in events.new():
            display.event(event)
        for line in records.new():
            display.line(line)
        display.refresh()
        if ended:
            return process.returncode
        time.sleep(0.2)


class _Tail:
    """New complete lines of a JSON-lines file that another process appends to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
        self.identity = path.stat().st_ino if path.exists() else None

    def new(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_ino != self.identity:  # rewritten on resume
                self.identity = os.fstat(file.fileno()).st_ino
                self.offset = min(self.offset, os.fstat(file.fileno()).st_size)
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.offset += len(line)
                yield json.loads(line)


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """A polite kill (a job scheduler's SIGTERM, a terminal that closes) ends the run in the same order as Ctrl-C.

    A signal that the caller has switched off (``nohup``) stays off.
    """

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    heeded = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def end_run(process: subprocess.Popen[bytes] | None, tag: str, patience: float) -> None:
    """Wait ``patience`` seconds for the process to end, then stop every process that carries the run's tag."""
    # A second signal must not stop the clean-up half-way.
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in ending}
    try:
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=patience)
        leftovers = _tagged(tag)
        for leftover in leftovers:
            _quietly(leftover.terminate)
        _, alive = psutil.wait_procs(leftovers, timeout=5)
        for leftover in {*alive, *_tagged(tag)}:
            _quietly(leftover.kill)
        psutil.wait_procs(list(alive), timeout=5)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _tagged(tag: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(RUN_TAG) == tag:
                found.append(process)
        except psutil.Error:
            continue
    return found


def stale_processes(held: Path | None = None) -> list[tuple[Path, list[int], int]]:
    """(run folder, process ids, bytes of memory) of every run whose launcher is gone while processes are not.

    A run's processes carry its tag and folder in their environment; its launcher holds a lock on the folder. Other
    users' processes are not seen.

    Args:
        held: a folder whose lock this process has itself.
    """
    sizes: dict[Path, dict[int, int]] = {}
    for process in psutil.process_iter():
        try:
            variables = process.environ()
            if process.pid == os.getpid() or not {RUN_TAG, RUN_FOLDER} <= variables.keys():
                continue
            size = process.memory_full_info().pss  # shared pages count once over all processes
        except (psutil.Error, OSError):
            continue
        sizes.setdefault(Path(variables[RUN_FOLDER]), {})[process.pid] = size
    stale = {folder: run for folder, run in sorted(sizes.items()) if folder == held or not _owned(folder)}
    return [(folder, sorted(run), sum(run.values())) for folder, run in stale.items()]


def _owned(folder: Path) -> bool:
    """Whether a launcher holds the run folder; also true where that cannot be told."""
    try:
        with open(folder / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _quietly(action: Callable[[], object]) -> None:
    with suppress(psutil.NoSuchProcess):
        action()
