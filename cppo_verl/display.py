"""What a person sees of a run or an evaluation: a bar for what is going on, a line per step, a summary or a failure."""

import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cppo_verl.evaluation.samples import Evaluation
from cppo_verl.report import RunReport
from cppo_verl.run_log import accuracies

# Phases in which nothing is counted, with what is being waited for.
_WAITING = {
    "starting Ray": "starting Ray",
    "starting workers": "loading the model, starting FSDP actor and vLLM servers",
    "initialized": "workers are ready",
    "validating": "validating",
    "generating": "generating and training",
    "saving": "saving a checkpoint",
}

# Bytes below which a disk is called full: a run's log lines do not fit any more.
_FULL = 1 << 20

# Ray puts "(TaskRunner pid=123)", coloured, before every line of a worker.
_RAY_PREFIX = re.compile(r"^(\x1b\[\d+m)?\([^)]*\)(\x1b\[0m)?\s*")
_EXCEPTION = re.compile(r"^((?!ray\.exceptions\.RayTaskError)[\w.]*(?:Error|Exception): \S.{0,300})$")


class RunDisplay:
    """Progress of one run on the terminal; with output to a file or a pipe, plain lines only."""

    def __init__(self, folder: Path, log_file: Path) -> None:
        self.folder, self.log_file = folder, log_file
        self.failed = Failure(log_file)
        self.console = Console(highlight=False)
        self.started = time.time()
        self.first_step: int | None = None
        self.total_steps: int | None = None
        self.last_printed = 0
        self.step_seconds: list[float] = []
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn())
        self.progress = Progress(
            *columns, TimeElapsedColumn(), console=self.console, transient=True, disable=not self.console.is_terminal
        )
        self.task = self.progress.add_task("starting", total=None)

    def __enter__(self) -> "RunDisplay":
        self.console.print(f"run    {self.folder}\nlog    {self.log_file}", soft_wrap=True)
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def refresh(self) -> None:
        self.progress.refresh()

    def event(self, event: Mapping[str, Any]) -> None:
        """Show the phase a run has entered."""
        name = event["event"]
        self.failed.note(event)
        if name == "initialized":
            self.total_steps = event["total_steps"]
            self.first_step = event["step"]
            self.progress.update(self.task, total=self.total_steps, completed=event["step"])
            if self.first_step:
                self.console.print(f"going on after step {self.first_step} of {self.total_steps}")
        if name in _WAITING:
            self.progress.update(self.task, description=_WAITING[name])
            if not self.console.is_terminal and name not in ("generating", "saving"):
                self.console.print(f"{time.time() - self.started:6.0f} s  {_WAITING[name]}")

    def line(self, line: Mapping[str, Any]) -> None:
        """Show one step's (or the initial validation's) line when it is complete."""
        step = line["step"]
        validation = _mean_accuracy(line)
        if step == 0 or "training/global_step" not in line:
            if validation is not None and step == (self.first_step or 0):
                self.console.print(f"step {step:4d}  before training   {validation}")
            return
        seconds = line.get("timing_s/step")
        self.step_seconds.append(seconds or 0.0)
        self.progress.update(self.task, completed=step)
        self.console.print(self._step_line(step, line, validation), soft_wrap=True)

    def _step_line(self, step: int, line: Mapping[str, Any], validation: str | None) -> str:
        total = self.total_steps or step
        recent = sorted(self.step_seconds[-10:])
        left = max(total - step, 0) * recent[len(recent) // 2]
        parts = [
            f"step {step:4d}/{total}",
            f"reward {float('nan') if (reward := line.get('critic/score/mean')) is None else reward:.3f}",
            _masked_text(line),
            f"{line.get('timing_s/step', 0.0):5.1f} s",
            f"ETA {int(left // 60)}m{int(left % 60):02d}s",
        ]
        return "  ".join(parts + ([validation] if validation else []))

    def interrupted(self) -> None:
        self.console.print("interrupted: ending Ray, vLLM and the workers")

    def failure(self, status: int) -> None:
        self.failed.show(self.console, "the run", status)

    def summary(self) -> None:
        """Where things are and what came out, from the run folder alone."""
        report = RunReport.read(self.folder)
        report.write()
        since = f" (since step {self.first_step})" if self.first_step else ""
        rows = [*report.rows(), ("time", f"{(time.time() - self.started) / 60:.1f} min{since}")]
        width = max(len(name) for name, _ in rows)
        self.console.print("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows), soft_wrap=True)


class SamplingDisplay:
    """Progress of one evaluation on the terminal; with output to a file or a pipe, a line now and then."""

    def __init__(self, evaluation: Evaluation, log_file: Path, console: Console) -> None:
        self.total = evaluation.n * len(evaluation.questions)
        self.verdicts = [sample.outcome == "right" for sample in evaluation.samples.values()]
        self.evaluation, self.log_file, self.console = evaluation, log_file, console
        self.failure = Failure(log_file)
        self.started = self.printed = time.time()
        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, *times, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.progress.add_task("starting", total=self.total, completed=len(self.verdicts))

    def __enter__(self) -> "SamplingDisplay":
        kept = f", {len(self.verdicts)} are there" if self.verdicts else ""
        self.console.print(
            f"evaluation  {self.evaluation.folder}\nlog         {self.log_file}\n"
            f"samples     {len(self.evaluation.questions)} questions x {self.evaluation.n}{kept}",
            soft_wrap=True,
        )
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def refresh(self) -> None:
        self.progress.refresh()

    def event(self, event: Mapping[str, Any]) -> None:
        self.failure.note(event)
        self.printed = time.time()
        if event["event"] not in ("failed", "finished"):
            self.progress.update(self.task, description=event["event"])
            if not self.console.is_terminal:
                self.console.print(f"{time.time() - self.started:6.0f} s  {event['event']}")

    def line(self, line: Mapping[str, Any]) -> None:
        self.verdicts.append(line["outcome"] == "right")
        share = sum(self.verdicts) / len(self.verdicts)
        self.progress.update(self.task, completed=len(self.verdicts), description=f"right so far {share:.1%}")
        if not self.console.is_terminal and (time.time() - self.printed > 30 or len(self.verdicts) == self.total):
            self.printed = time.time()
            seconds = time.time() - self.started
            self.console.print(f"{seconds:6.0f} s  {len(self.verdicts)}/{self.total} samples, right so far {share:.1%}")

    def interrupted(self) -> None:
        self.console.print("interrupted: ending Ray and vLLM")


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
            console.print(f"{self._event['error']}: " + "\n  ".join(shown), markup=False, soft_wrap=True)
            for error, count in first_errors(self.log_file):
                if error.partition(": ")[2] not in self._event["message"]:
                    console.print(f"earlier: {error} ({count}x)", markup=False, soft_wrap=True)
        else:
            if shutil.disk_usage(self.log_file.parent).free < _FULL:
                console.print(
                    f"the disk of {self.log_file.parent} is full: make room, then continue the run", soft_wrap=True
                )
            console.print("the process ended without a message; the last lines of its log:")
            console.print("\n".join(_last_lines(self.log_file, 15)), markup=False, soft_wrap=True)
        console.print(f"full log: {self.log_file}", soft_wrap=True)


def _mean_accuracy(line: Mapping[str, Any]) -> str | None:
    """ "arithmetic Avg@16 0.312" for each validation set of a metrics line."""
    return "  ".join(f"{label} {value:.3f}" for label, value in accuracies(line).values()) or None


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


def _masked_text(line: Mapping[str, Any]) -> str:
    masked = line.get("trust_region/masked")
    if masked is None:
        return "masked -"
    token = line.get("trust_region/masked_by_token", 0.0)
    prefix = line.get("trust_region/masked_by_prefix", 0.0)
    return f"masked {masked:6.2%} (token {token:.2%}, prefix {prefix:.2%})"


def _last_lines(path: Path, count: int) -> list[str]:
    with open(path, errors="replace") as file:
        return [line.rstrip() for line in file.readlines()[-count:]]
