"""Whether a run still gets on, seen from its launcher; if not, in what it hangs, and the stacks of its processes."""

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from cppo_verl.run.progress import PROGRESS, SIGNAL, last_thread

# Whose work a phase is, where no process says that it hangs in a part; as the processes call themselves.
_WORK_OF = {
    "generation": ("vLLM engine", "vLLM server", "model copy"),
    "loading the model": ("model copy",),
    "validation": ("vLLM engine", "vLLM server"),
    "update": ("actor worker",),
    "weight sync": ("actor worker", "vLLM server"),
}
# What a training leaves.
KEPT = "Checkpoints are intact: run.resume=true continues from the last complete one"
# Seconds for a process to write its stacks.
_PATIENCE = 3.0
# Frames that are shown; all of them are in a file.
_FRAMES = 3


class Stalled(Exception):
    """A run that does not get on; the message says where, in a few lines."""


class Worker(NamedTuple):
    """What a process has last said of itself."""

    name: str
    host: str
    pid: int
    phase: str
    done: int
    doing: Mapping[str, float]
    file: Path

    @property
    def stacks(self) -> str:
        """What it has written when it was asked; empty where it has not."""
        try:
            return self.file.with_suffix(".stacks").read_text(errors="replace")
        except OSError:
            return ""


class Watch:
    """Looks at the files in ``folder``; ``limit`` seconds without a change are a stall.

    kept: what of the work is not lost, and how it goes on; the last sentence of the report.
    """

    def __init__(self, folder: Path, limit: float, kept: str = KEPT) -> None:
        self.folder, self.limit, self.kept = folder, limit, kept
        self._interval = min(2.0, limit / 10)
        self._seen: dict[Path, tuple[str, int]] = {}
        self._moved = self._looked = time.monotonic()

    def moved(self) -> None:
        """The run has written something else: an event, a step's metrics."""
        self._moved = time.monotonic()

    def check(self) -> None:
        """Raise Stalled where the run does not get on. Cheap enough for several calls a second."""
        now = time.monotonic()
        if now - self._looked < self._interval:
            return
        # After a sleep of the launcher (Ctrl-Z, a suspended machine) the run may have had no time either.
        slept, self._looked = now - self._looked > max(5.0, 5 * self._interval), now
        seen = {worker.file: (worker.phase, worker.done) for worker in self._workers()}
        if seen != self._seen or slept:
            self._seen, self._moved = seen, now
        elif now - self._moved > self.limit:
            raise Stalled(self._report())

    def _workers(self) -> list[Worker]:
        found = []
        for path in sorted(self.folder.glob("*.json")):
            with suppress(OSError, ValueError, KeyError):
                said: dict[str, Any] = json.loads(path.read_text())
                name, host, pid = (said[key] for key in ("worker", "host", "pid"))
                found.append(Worker(name, host, pid, said["phase"], said["done"], said["doing"], path))
        return found

    def _report(self) -> str:
        workers, here = self._workers(), self._processes()
        head = f"no progress for {self.limit / 60:.3g} minutes in"
        phase, worker = self._hanging(workers)
        file = self._collect(workers, here)
        for process in here.values():
            if _is_stopped(process):
                name = next((worker.name for worker in workers if worker.pid == process.pid), process.name())
                where = f"{name} (process {process.pid}) is stopped by a signal (kill -CONT lets it go on)"
                return f"{head} {phase}: {where}\nstacks of the others: {file}. {self.kept}"
        if worker is None:
            return f"{head} {phase}: no process has said what it does. {self.kept}"
        frames = last_thread(worker.stacks)[:_FRAMES]
        where = f"{worker.name} (process {worker.pid} on {worker.host}) {'is in' if frames else 'does not answer'}"
        return "\n".join([f"{head} {phase}: {where}", *frames, f"all stacks: {file}. {self.kept}"])

    def _hanging(self, workers: Sequence[Worker]) -> tuple[str, Worker | None]:
        """(phase, worker): one that has long been in a part, else one whose work the driver's phase is."""
        driver = next((worker for worker in workers if worker.phase), None)
        long_ago = time.time() - self.limit / 2
        parts = [
            (since, part, worker)
            for worker in workers
            for part, since in worker.doing.items()
            if since < long_ago
        ]  # fmt: skip
        if parts:
            _, part, worker = min(parts, key=lambda entry: entry[0])
            return part, worker
        phase = driver.phase if driver else "the start"
        wanted = _WORK_OF.get(phase, ())
        named = (worker for name in wanted for worker in workers if worker.name.startswith(name))
        return phase, next(named, driver or (workers[0] if workers else None))

    def _processes(self) -> dict[int, psutil.Process]:
        """The run's on this machine: those that carry the folder's name."""
        found = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(PROGRESS) == str(self.folder):
                    found[process.pid] = process
        return found

    def _collect(self, workers: Sequence[Worker], here: Mapping[int, psutil.Process]) -> Path:
        """Ask every process on this machine that knows the signal for its stacks; the file that has them all."""
        near = [worker for worker in workers if worker.host == socket.gethostname() and worker.pid in here]
        asked = [
            worker
            for worker in near
            if not _is_stopped(here[worker.pid]) and worker.file.with_suffix(".stacks").exists()
        ]
        for worker in asked:
            with suppress(OSError):
                os.kill(worker.pid, SIGNAL)
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline and not all(worker.stacks for worker in asked):
            time.sleep(0.05)
        time.sleep(0.1)  # the end of the last one
        texts = (f"== {w.name}, process {w.pid} on {w.host}\n{w.stacks or 'not to be had'}" for w in workers)
        file = self.folder / "stacks.txt"
        with suppress(OSError):
            file.write_text("\n".join(texts))
        return file


def _is_stopped(process: psutil.Process) -> bool:
    """By SIGSTOP or a debugger."""
    try:
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.Error:
        return False
