"""Why a process ended: its own last words, and what came before them in its log."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

# Bytes below which a disk is called full: a run's log lines do not fit any more.
_FULL = 1 << 20

# Ray puts "(TaskRunner pid=123)", coloured, before every line of a worker.
_RAY_PREFIX = re.compile(r"^(\x1b\[\d+m)?\([^)]*\)(\x1b\[0m)?\s*")
_EXCEPTION = re.compile(r"^((?!ray\.exceptions\.RayTaskError)[\w.]*(?:Error|Exception): \S.{0,300})$")


class Failure:
    """Why a process ended: its own last words, and what came before them in its log."""

    def __init__(self, log_file: Path) -> None:
        self.log_file = log_file
        self._event: dict[str, Any] | None = None

    def note(self, event: Mapping[str, Any]) -> None:
        """Keep the event if it is a failure."""
        if event["event"] == "failed":
            self._event = dict(event)

    def show(self, console: Console, what: str, status: int) -> None:
        """The cause in a few lines; the rest is in the log."""
        console.print(f"\n{what} failed (exit status {status})")
        if self._event:
            lines = [text for text in self._event["message"].strip().splitlines() if text.strip()]
            shown = lines if len(lines) <= 6 else lines[-6:]
            console.print(f"{self._event['error']}: " + "\n  ".join(shown), soft_wrap=True)
            for error, count in first_errors(self.log_file):
                if error.partition(": ")[2] not in self._event["message"]:
                    console.print(f"earlier: {error} ({count}x)", soft_wrap=True)
        else:
            if shutil.disk_usage(self.log_file.parent).free < _FULL:
                console.print(
                    f"the disk of {self.log_file.parent} is full: make room, then continue the run", soft_wrap=True
                )
            console.print("the process ended without a message; the last lines of its log:")
            console.print("\n".join(_last_lines(self.log_file, 15)), soft_wrap=True)
        console.print(f"full log: {self.log_file}", soft_wrap=True)


def first_errors(log: Path, limit: int = 3) -> list[tuple[str, int]]:
    """The first distinct exceptions of a log, whichever process they are of, and how often each occurs.

    The exception that ends a run is often only what a worker's first one led to.
    """
    counts: dict[str, int] = {}
    if log.exists():
        with open(log, errors="replace") as file:
            lines = (_RAY_PREFIX.sub("", line) for line in file)
            for line in lines:
                if match := _EXCEPTION.match(line):
                    error = match[1]
                    if error.startswith("ray.exceptions.Actor"):  # which one stands in the next line
                        error += f" ({next(lines, '').strip()})"
                    counts[error] = counts.get(error, 0) + 1
    return list(counts.items())[:limit]


def _last_lines(path: Path, count: int) -> list[str]:
    with open(path, errors="replace") as file:
        return [line.rstrip() for line in file.readlines()[-count:]]
