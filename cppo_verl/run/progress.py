"""What each process of a run is doing: a small file, written when that changes, and its stacks when a signal comes.

The launcher reads them (``run/stall.py``), because any other process may be the one that hangs. Where the launcher does
not ask for it, nothing is written. Standard library only.
"""

import faulthandler
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Names the folder of the files, in the environment of a run's processes.
PROGRESS = "CPPO_PROGRESS"

# Has a process write its stacks; SIGUSR1 is the lifeline's.
SIGNAL = signal.SIGUSR2

# Seconds between two looks at whether there is something to write.
_INTERVAL = 1.0


class Progress:
    """Counts what a process has finished, under the phase that it is in; called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phase, self._done = "", 0
        # part -> (how often it is being done, when that changed last)
        self._doing: dict[str, tuple[int, float]] = {}
        self._worker, self._pid = "", 0

    def phase(self, name: str) -> None:
        """What comes now, until the next call."""
        with self._lock:
            self._phase = name
            self._done += 1

    def advance(self) -> None:
        """Something of the phase is finished: a response, a minibatch."""
        with self._lock:
            self._done += 1

    @contextmanager
    def doing(self, part: str, counts: bool = True) -> Iterator[None]:
        """Inside, this process does ``part``; at the end it has finished something, if that ``counts``."""
        self._count(part, 1)
        try:
            yield
        finally:
            self._count(part, -1)
            if counts:
                self.advance()

    def _count(self, part: str, change: int) -> None:
        with self._lock:
            self._doing[part] = (self._doing.get(part, (0, 0.0))[0] + change, time.time())

    def state(self) -> dict[str, Any]:
        """As it is written: ``doing`` has the parts that are being done and since when nothing of them has changed."""
        with self._lock:
            doing = {part: since for part, (count, since) in self._doing.items() if count}
            return {"phase": self._phase, "done": self._done, "doing": doing}

    def report(self, worker: str | None = None) -> None:
        """Begin to write this process's files, if the launcher has asked for them.

        Args:
            worker: what the process is called; None: a part of vLLM, unless it has another name already.
        """
        folder = os.environ.get(PROGRESS)
        with self._lock:
            begun = self._pid == os.getpid()  # not in a fork
            self._worker = worker or (self._worker if begun else "vLLM engine")
            if begun or folder is None:
                return
            self._pid = os.getpid()
        base = Path(folder) / f"{socket.gethostname()}-{self._pid}"
        with suppress(OSError):
            stacks = open(f"{base}.stacks", "w")  # noqa: SIM115
            faulthandler.register(SIGNAL, file=stacks, all_threads=True)
        threading.Thread(target=self._write, args=(base.with_name(base.name + ".json"),), daemon=True).start()

    def report_in_forks(self) -> None:
        """Processes that this one forks report as well; what they inherit of it stands still."""

        def begin() -> None:
            self._lock.release()
            self.report()

        os.register_at_fork(before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=begin)

    def _write(self, path: Path) -> None:
        written, temporary = None, path.with_suffix(".new")
        while True:
            state = {"worker": self._worker, "host": socket.gethostname(), "pid": self._pid, **self.state()}
            if state != written:
                with suppress(OSError):  # a full disk stops the run itself elsewhere
                    temporary.write_text(json.dumps(state))
                    os.replace(temporary, path)
                    written = state
            time.sleep(_INTERVAL)


_here = Progress()
phase, advance, doing, report = _here.phase, _here.advance, _here.doing, _here.report
report_in_forks = _here.report_in_forks


def counting(read: Callable[[], None], size: Callable[[], Any]) -> Callable[[], None]:
    """``read``, which asks TransferQueue what is there: progress where ``size`` of it has changed."""
    before = None

    def counted() -> None:
        nonlocal before
        with _here.doing("queue", counts=False):
            read()
        if (now := size()) != before:
            before = now
            _here.advance()

    return counted


def last_thread(stacks: str) -> list[str]:
    """The innermost frames of the main thread, which faulthandler writes last: "function (file:line)"."""
    section = re.split(r"^(?:Current t|T)hread .*$", stacks, flags=re.MULTILINE)[-1]
    frames = re.findall(r'^  File "(.*)", line (\d+) in (.*)$', section, re.MULTILINE)
    return [f"{function} ({file}:{line})" for file, line, function in frames]
