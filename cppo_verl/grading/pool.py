"""A few worker processes that may hang, be killed and be replaced, shared by any number of threads.

Started with `subprocess`, never by forking Python: the parent may hold torch, CUDA, Ray and threads with locks.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

MAX_WORKERS = 4  # per process; verl runs several reward processes per node
START_LIMIT = 120.0  # seconds to import sympy; on a busy node with a cold network disk this is slow
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


class WorkerTimeout(Exception):
    """The worker did not answer in time, and was killed."""


class WorkerDied(Exception):
    """The worker ended before it answered."""


class Worker:
    """One worker process; used by one thread at a time."""

    def __init__(self) -> None:
        """Start the process and wait until it has imported math-verify.

        Raises:
            WorkerDied, WorkerTimeout: it did not come up.
            RuntimeError: it came up without math-verify; the message names what is missing.
        """
        # The worker sees the modules the parent sees, wherever the parent got them from (Ray sets sys.path itself).
        # A fixed hash seed makes sympy's ordering, and so its verdicts, repeatable.
        path = os.pathsep.join([str(_PACKAGE_ROOT), *filter(None, sys.path)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cppo_verl.grading.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C is for the parent to handle
        )
        try:
            hello = self._read(START_LIMIT)
            if "error" in hello:
                raise RuntimeError(f"the grading worker cannot start: {hello['error']}")
        except BaseException:
            self.kill()
            raise

    def ask(self, question: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The reply to one question. After any exception the worker must be killed: its reply may still come.

        Raises:
            WorkerTimeout: no reply within `timeout` seconds.
            WorkerDied: the process ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({**question, "timeout": timeout}).encode() + b"\n")
        except OSError as error:
            raise WorkerDied("the worker was gone before it was asked") from error
        return self._read(timeout)

    def kill(self) -> None:
        """End the process now and reap it."""
        self._process.kill()
        self._process.wait()
        self.abandon()

    def abandon(self) -> None:
        """Close this end of the pipes, which ends an idle worker."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self, timeout: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        ready = select.poll()  # not select(): a Ray worker can hold more than 1024 descriptors
        ready.register(self._process.stdout, select.POLLIN)
        line = b""
        while not line.endswith(b"\n"):
            if not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise WorkerTimeout(f"no answer within {timeout:.1f} s")
            chunk = os.read(self._process.stdout.fileno(), 65536)
            if not chunk:
                raise WorkerDied("the worker ended before it answered")
            line += chunk
        return json.loads(line)


class WorkerPool:
    """Up to `size` workers, started when first needed. Callers queue for a free one; queueing costs no answer time."""

    def __init__(self, size: int) -> None:
        self._free = threading.BoundedSemaphore(size)
        self._lock = threading.Lock()
        self._idle: list[Worker] = []
        self._workers: set[Worker] = set()

    def ask(self, question: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The reply to one question, on a worker that is killed if it takes longer than `timeout` seconds.

        A worker found dead is replaced and the question asked once more, within what is left of its time; the start
        of the new one is not counted.

        Raises:
            WorkerTimeout, WorkerDied, RuntimeError, OSError: as `Worker` does.
        """
        with self._free:
            worker, is_new = self._take()
            started = time.monotonic()
            try:
                return self._ask(worker, question, timeout)
            except WorkerDied:
                if is_new:
                    raise
                left = max(0.0, timeout - (time.monotonic() - started))
            return self._ask(self._start(), question, left)

    def close(self) -> None:
        """Kill every worker; the pool may be used again."""
        with self._lock:
            workers, self._idle, self._workers = list(self._workers), [], set()
        for worker in workers:
            worker.kill()

    def abandon(self) -> None:
        """In a forked child: let go of the parent's workers without touching the processes."""
        for worker in self._workers:
            worker.abandon()

    def _take(self) -> tuple[Worker, bool]:
        """(worker, whether it is a new one)."""
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        return (worker, False) if worker else (self._start(), True)

    def _start(self) -> Worker:
        worker = Worker()
        with self._lock:
            self._workers.add(worker)
        return worker

    def _ask(self, worker: Worker, question: dict[str, Any], timeout: float) -> dict[str, Any]:
        reply = None
        try:
            reply = worker.ask(question, timeout)
            return reply
        finally:
            if reply is None:
                self._discard(worker)
            else:
                with self._lock:
                    self._idle.append(worker)

    def _discard(self, worker: Worker) -> None:
        with self._lock:
            self._workers.discard(worker)
        worker.kill()


def _new_pool() -> WorkerPool:
    return WorkerPool(min(MAX_WORKERS, os.cpu_count() or 1))


def _after_fork() -> None:
    global _pool
    _pool.abandon()
    _pool = _new_pool()


_pool = _new_pool()
atexit.register(lambda: _pool.close())
os.register_at_fork(after_in_child=_after_fork)


def ask(question: dict[str, Any], timeout: float) -> dict[str, Any]:
    """`WorkerPool.ask` on the pool of this process."""
    return _pool.ask(question, timeout)
