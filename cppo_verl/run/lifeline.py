"""How a process that the launcher starts ends: in order when the launcher is gone, even if killed with SIGKILL, and
without delay when its work is done."""

import atexit
import ctypes
import os
import signal
import sys
import threading
from typing import Any, NoReturn

# Linux; loaded here, because a forked process must not import. Not SIGTERM, whose handler Ray sets itself.
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_SIGNAL = signal.SIGUSR1


def tie() -> None:
    """In the new process, before it becomes another program: have the kernel signal the death of its parent."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, _SIGNAL)


def heed() -> None:
    """In the started program: leave by SystemExit when the signal comes, so that Ray stops what it has started.

    And by KeyboardInterrupt when the launcher asks for it, which a shell's background job (``cppo train ... &`` in a
    script) has inherited to ignore.
    """

    def exit_in_order(*_: Any) -> None:
        signal.signal(_SIGNAL, signal.SIG_IGN)  # the kernel sends it once for every thread of the parent
        sys.exit(128 + _SIGNAL)

    signal.signal(_SIGNAL, exit_in_order)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def leave() -> NoReturn:
    """End this process, which has done its work, as Python does it but for the very last.

    Threads are waited for and callbacks called; then Python would free all that was imported, object by object, which
    takes seconds of a core after verl and vLLM.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
