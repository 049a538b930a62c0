"""Why a process ended: its own last words, and what came before them in its log."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from cppo_verl.run.causes import first_errors, is_following, known_cause, plain_lines

# Bytes below which a disk is called full: a run's log lines do not fit any more.
_FULL = 1 << 20


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
        if cause := self._cause():
            console.print(f"cause: {cause}", soft_wrap=True)
        if self._event:
            lines = [text for text in self._event["message"].strip().splitlines() if text.strip()]
            shown = lines if len(lines) <= 6 else lines[-6:]
            console.print(f"{self._event['error']}: " + "\n  ".join(shown), soft_wrap=True)
            last = f"{self._event['error']}: {lines[0]}" if lines else None
            for error, count in first_errors(self.log_file, before=last):
                if error.partition(": ")[2] not in self._event["message"] and error != cause:
                    console.print(f"earlier: {error} ({count}x)", soft_wrap=True)
        else:
            if shutil.disk_usage(self.log_file.parent).free < _FULL:
                console.print(
                    f"the disk of {self.log_file.parent} is full: make room, then continue the run", soft_wrap=True
                )
            console.print("the process ended without a message; the last lines of its log:")
            console.print("\n".join(_last_lines(self.log_file, 15)), soft_wrap=True)
        console.print(f"full log: {self.log_file}", soft_wrap=True)

    def _cause(self) -> str | None:
        """What led to the failure, where the event does not say: a known cause, else a worker's first exception."""
        said = f"{self._event['error']}: {self._event['message']}" if self._event else ""
        if known_cause(said.splitlines()) and not is_following(said):
            return None
        if cause := known_cause(plain_lines(self.log_file)):
            return cause
        first = (error for error, _ in first_errors(self.log_file) if not is_following(error))
        return next(first, None) if is_following(said) else None


def _last_lines(path: Path, count: int) -> list[str]:
    with open(path, errors="replace") as file:
        return [line.rstrip() for line in file.readlines()[-count:]]
