"""Starts a process of ours, follows what it writes, and leaves nothing of it running, however it ends."""

import fcntl
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
from cppo_verl.run.files import DamagedFile, parse_line
from cppo_verl.run.log import EVENTS, RunLog
from cppo_verl.run.machine import joined_cluster
from cppo_verl.run.progress import PROGRESS
from cppo_verl.run.stall import KEPT, Stalled, Watch
from cppo_verl.run.terminal import warn

# Every process of a run inherits this variable; what still carries it after the run is the run's own leftover.
RUN_TAG = "CPPO_RUN_TAG"

# Of the folder that a process writes; carried by all that it starts.
RUN_FOLDER = "CPPO_RUN_FOLDER"

# umask of what a run writes.
_PRIVATE = 0o077

# Exit status of a run that was interrupted (the shell's for SIGINT), and of one that did not get on (timeout's).
INTERRUPTED, STALLED = 130, 124

# Defaults for the environment of a run; what the user has set wins.
_ENVIRONMENT = {
    "HYDRA_FULL_ERROR": "1",
    "PYTHONUNBUFFERED": "1",
    "RAY_DEDUP_LOGS": "0",
    # A Ray job and the run in it may name the same variable: without this Ray refuses that.
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray keeps what became of the last 100,000 calls for `ray list tasks`: half a MiB a step, until it has them.
    "RAY_task_events_report_interval_ms": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
}
# Of a run on one machine: whatever it opens is for that machine. The first is Ray's switch that makes 127.0.0.1 the
# node's address, which verl, TransferQueue and vLLM's HTTP server take over.
_ONE_MACHINE_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_HOST_IP": "127.0.0.1",
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
    """Make ``folder`` and hold it for this process; False, after a message, where that cannot be.

    A new folder and what is written meanwhile are for the user alone.
    """
    with suppress(OSError):  # of which the folder's own mkdir tells
        folder.parent.mkdir(parents=True, exist_ok=True)
    previous = os.umask(_PRIVATE)
    try:
        with _held(folder) as free:
            yield free
    finally:
        os.umask(previous)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    try:
        folder.mkdir(exist_ok=True)
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
    module: str,
    folder: Path,
    log_file: Path,
    environment: dict[str, str],
    lines: Path,
    display: Display,
    stall: float | None = None,
    kept: str = KEPT,
) -> int:
    """Run ``python -m module folder`` to its end and leave nothing of it running; returns its exit status.

    Args:
        lines: a JSON-lines file that the process appends to, shown beside the folder's events.
        stall: seconds without progress that end it, with the event "failed" and STALLED; None: it may take its time.
        kept: what is said then of the work that is not lost.
    """
    tag = uuid.uuid4().hex
    process, stalled, watch = None, None, None
    environment = {**environment, RUN_TAG: tag}
    environment.pop(PROGRESS, None)
    if stall is not None:
        watch = Watch(log_file.with_suffix(".progress"), stall, kept)
        watch.folder.mkdir(exist_ok=True)
        environment[PROGRESS] = str(watch.folder)
    with _termination_as_interrupt(), open(log_file, "ab") as log:
        try:
            process = start(module, [str(folder)], log, environment)
            with display:
                status = _follow(process, folder, lines, display, watch)
        except KeyboardInterrupt:
            display.interrupted()
            if process is not None:
                process.send_signal(signal.SIGINT)
            status = INTERRUPTED
        except Stalled as error:
            stalled, status = error, STALLED
            if process is not None:
                process.send_signal(signal.SIGINT)
        finally:
            end_run(process, tag, patience=15)
    if stalled is not None:
        failed = {"error": type(stalled).__name__, "message": str(stalled)}
        display.event({"event": "failed", **failed})
        with suppress(OSError):  # the terminal has it
            RunLog(folder).event("failed", **failed)
    return status


def process_environment(on_cpu: bool, model: str, address: str | None = None) -> dict[str, str]:
    """What every process that loads ``model`` gets; variables that the user has set win.

    Args:
        address: of the Ray cluster that is joined, as ``ray.init`` takes it; None: as RAY_ADDRESS says.
    """
    one_machine = {} if joined_cluster(address) else _ONE_MACHINE_ENVIRONMENT
    defaults = {**_ENVIRONMENT, **one_machine, **(_CPU_ENVIRONMENT if on_cpu else {})}
    if Path(model).is_dir():
        # A local model needs no hub; without this, loading it waits for a network that may not be there.
        defaults["HF_HUB_OFFLINE"] = "1"
    return {**defaults, **os.environ}


def start(module: str, arguments: list[str], log: IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """``python -m module arguments``, tied to this process; output goes to ``log``, files are the user's alone."""
    _keep_ray_token_private()
    command = [sys.executable, "-m", module, *arguments]
    # A session of its own: Ctrl-C reaches the launcher only, which ends the run in order.
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,
        umask=_PRIVATE,
        preexec_fn=lifeline.tie,
    )


def _keep_ray_token_private() -> None:
    """Ray has made the token that protects its processes readable for everybody, where another umask held."""
    token = Path.home() / ".ray" / "auth_token"
    with suppress(OSError):
        token.chmod(0o600)


def _follow(process: subprocess.Popen[bytes], folder: Path, lines: Path, display: Display, watch: Watch | None) -> int:
    """Show events and lines as they are written, until the process ends. Raises Stalled where it does not get on."""
    events, records = _Tail(folder / EVENTS), _Tail(lines)
    while True:
        ended = process.poll() is not None
        for event in events.new():
            display.event(event)
            if watch:
                watch.moved()
        for line in records.new():
            display.line(line)
            if watch:
                watch.moved()
        display.refresh()
        if ended:
            return process.returncode
        if watch:
            watch.check()
        time.sleep(0.2)


class _Tail:
    """New complete lines of a JSON-lines file that another process appends to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        written = path.read_bytes() if path.exists() else b""
        self.offset, self.number = written.rfind(b"\n") + 1, written.count(b"\n")
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
                self.number += 1
                try:
                    yield parse_line(line, self.path, self.number)
                except DamagedFile as error:  # no reason to end the process that is followed
                    warn(f"cppo: {error}")


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
            _quietly(leftover.resume)  # one that was stopped takes no signal but the last
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
