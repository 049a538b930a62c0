"""Cells measured in processes of their own, one after the other, with a line for each that is finished."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cppo_verl.bench.cells import RECORDS, Cell, by_process, write_plan
from cppo_verl.bench.timing import Effort
from cppo_verl.run.machine import has_gpu
from cppo_verl.run.supervisor import INTERRUPTED, process_environment, supervise


class Progress:
    """A line for each finished cell."""

    def __init__(self, describe: Callable[[Cell], str], total: int) -> None:
        self.describe, self.total, self.finished = describe, total, 0
        self.started = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    def event(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "failed":
            print(f"cppo bench: {event['error']}: {event['message']}", file=sys.stderr)

    def line(self, line: Mapping[str, Any]) -> None:
        self.finished += 1
        seconds = time.monotonic() - self.started
        print(f"[{self.finished}/{self.total}] {seconds:5.0f} s  {self.describe(dict(line))}", flush=True)

    def refresh(self) -> None:
        """Lines say it all."""

    def interrupted(self) -> None:
        print("cppo bench: interrupted", file=sys.stderr)


def measure_cells(
    folder: Path, cells: Sequence[Cell], effort: Effort, describe: Callable[[Cell], str], extra: dict[str, str]
) -> int:
    """Measure ``cells`` into RECORDS of ``folder``; the exit status of the first process that failed, or 0.

    Args:
        extra: environment variables, whatever the user has set.
    """
    progress, log = Progress(describe, len(cells)), folder / "bench.log"
    # A folder as "model": all of them are made here, and no hub is asked.
    environment = process_environment(not has_gpu(), str(folder)) | extra
    for group in by_process(cells):
        write_plan(folder, group, effort)
        status = supervise("cppo_verl.bench.measure.process", folder, log, environment, folder / RECORDS, progress)
        if status != 0:
            if status != INTERRUPTED:
                print(f"cppo bench: the measuring process ended with status {status}; see {log}", file=sys.stderr)
            return status
    return 0
