"""The process that runs the algebra: `python -m cppo_verl.grading.worker`, one JSON line in, one JSON line out.

It sets no time limit of its own on a question: the pool that started it kills it. What it does guard is the machine:
its memory is capped, and it never outlives the process that started it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

MEMORY_LIMIT = 2 << 30  # bytes of address space; math-verify itself needs a fifth of that
ORPHAN_GRACE = 2.0  # seconds a question may run on when the pool is gone and nobody is left to kill the worker


def main() -> int:
    """Answer questions from standard input until it closes. Exit status 1 if math-verify cannot be loaded."""
    replies = _private_stdout()
    _cap_memory()
    try:
        from cppo_verl.grading.judge import judge
    except ImportError as error:
        replies.write(_line({"error": f"{type(error).__name__}: {error}"}))
        return 1
    replies.write(_line({"ready": True}))
    for line in sys.stdin.buffer:
        question = json.loads(line)
        # The default action of SIGALRM ends the process even inside one long call into GMP. It only ever fires in a
        # worker whose pool was killed; an idle one leaves the loop when the pipe closes.
        signal.setitimer(signal.ITIMER_REAL, question["timeout"] + ORPHAN_GRACE)
        try:
            reply: dict[str, Any] = {"right": judge(question["gold"], question["sides"])}
        except MemoryError:  # the heap is in no state to trust: die, and be replaced
            raise
        except Exception as error:  # the grader counts it
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(_line(reply))
    return 0


def _private_stdout() -> Any:
    """The reply pipe under a file descriptor of its own, so that a library that prints cannot garble a reply."""
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return replies


def _cap_memory() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


if __name__ == "__main__":
    sys.exit(main())
