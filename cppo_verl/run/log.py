"""The files a run writes while it trains: ``metrics.jsonl`` (one line per step or validation) and ``events.jsonl``.

Shared by the training process, which appends, and the command line, which follows them. Standard library only.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cppo_verl.run.files import DamagedFile, append_line, numbered_lines, read_lines, write_lines

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"


class RunLog:
    """Appends JSON lines to a run folder; each line is complete on disk before the call returns."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics of ``step``; later lines of the same step add to and override earlier ones."""
        self._append(METRICS, {"step": int(step), "time": time.time(), **plain_metrics(values)})

    def event(self, name: str, **details: Any) -> None:
        """Something a person waiting would want to know: a phase that begins, a failure."""
        self._append(EVENTS, {"event": name, "time": time.time(), **details})

    @contextmanager
    def outcome(self) -> Iterator[None]:
        """What happens inside ends with the event "finished" or "failed", the latter with its cause."""
        try:
            yield
        except BaseException as error:
            cause: Any = getattr(error, "cause", None) or error  # Ray puts a worker's exception there
            with suppress(OSError):  # a full disk must not hide what it led to
                self.event("failed", error=type(cause).__name__, message=str(cause))
            raise
        self.event("finished")

    def forget_after(self, step: int) -> None:
        """Drop metrics of steps beyond ``step``: a resumed run trains them again."""
        path = self.folder / METRICS
        if not path.exists():
            return
        write_lines(path, [line for line in read_lines(path) if line["step"] <= step])

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        append_line(self.folder / name, record)


def read_metrics(folder: str | Path, say: Callable[[str], None] | None = None) -> dict[int, dict[str, Any]]:
    """All metrics of a run folder by step, ascending; ``say`` is told of a last line that was cut off.

    Raises:
        DamagedFile: another line is no metrics of a step.
    """
    steps: dict[int, dict[str, Any]] = {}
    path = Path(folder) / METRICS
    for number, line in numbered_lines(path, say) if path.exists() else ():
        if not isinstance(line.get("step"), int):
            raise DamagedFile(path, number, "names no step", "mend or delete that line")
        steps.setdefault(line["step"], {}).update(line)
    return dict(sorted(steps.items()))


def accuracies(line: Mapping[str, Any]) -> dict[str, tuple[str, float]]:
    """metric name -> ("AIME24 Avg@16", value) for every validation accuracy in a line of metrics."""
    found = {}
    for key, value in line.items():
        if key.startswith("val-core/") and "/acc/mean@" in key and isinstance(value, int | float):
            source, _, samples = key.removeprefix("val-core/").partition("/acc/mean@")
            found[key] = (f"{source} Avg@{samples}", value)
    return found


def validation_score(line: Mapping[str, Any]) -> float | None:
    """The accuracy by which checkpoints are compared: the AIME mean where there is one, else the mean of all sets."""
    found = {label.split()[0]: value for label, value in accuracies(line).values()}
    if not found:
        return None
    return found.get("aime_mean", sum(found.values()) / len(found))


def plain_metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON, without verl's internal records, which are dicts (and leave its own metrics before they are logged)."""
    return {name: _plain(value) for name, value in values.items() if not isinstance(value, Mapping)}


def _plain(value: Any) -> Any:
    """A JSON number or string; NaN and infinity become null, which every JSON reader understands."""
    if isinstance(value, str | bool) or value is None:
        return value
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else number
