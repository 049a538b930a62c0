"""What a person sees of a run: a bar for what is going on, a line per step, a summary or a failure."""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cppo_verl.run.failure import Failure
from cppo_verl.run.log import accuracies
from cppo_verl.run.terminal import console
from cppo_verl.training.reward_signal import causes, without_signal
from cppo_verl.training.summary import RunSummary

# Phases in which nothing is counted, with what is being waited for.
_WAITING = {
    "starting Ray": "starting Ray",
    "starting workers": "loading the model, starting FSDP actor and vLLM servers",
    "initialized": "workers are ready",
    "validating": "validating",
    "generating": "generating and training",
    "saving": "saving a checkpoint",
}


class RunDisplay:
    """Progress of one run on the terminal; with output to a file or a pipe, plain lines only."""

    def __init__(self, folder: Path, log_file: Path) -> None:
        self.folder, self.log_file = folder, log_file
        self.failed = Failure(log_file)
        self.console = console()
        self.started = time.time()
        self.first_step: int | None = None
        self.total_steps: int | None = None
        self.signal_missed = False
        self.step_seconds: list[float] = []
        self.outcome: Future[RunSummary] | None = None
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(24), MofNCompleteColumn())
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
        if name == "finished":
            self._write_outcome()  # which takes seconds, as does the end of Ray that is waited for meanwhile
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
        if not self.signal_missed and without_signal(line):
            self.signal_missed = True  # once; the summary counts
            said = f"nothing to learn from: no group has right and wrong responses. {causes(line)}"
            self.console.print(said, soft_wrap=True)

    def _step_line(self, step: int, line: Mapping[str, Any], validation: str | None) -> str:
        total = self.total_steps or step
        recent = sorted(self.step_seconds[-10:])
        left = max(total - step, 0) * recent[len(recent) // 2]
        parts = [
            f"step {step:4d}/{total}",
            f"reward {float('nan') if (reward := line.get('critic/score/mean')) is None else reward:.3f}",
            _masked_text(line),
            *([] if (age := line.get("staleness/mean")) is None else [f"stale {age:.2f}"]),
            f"{line.get('timing_s/step', 0.0):5.1f} s",
            f"ETA {int(left // 60)}m{int(left % 60):02d}s",
        ]
        return "  ".join(parts + ([validation] if validation else []))

    def interrupted(self) -> None:
        self.console.print("interrupted: ending Ray, vLLM and the workers")

    def failure(self, status: int) -> None:
        self.failed.show(self.console, "the run", status)

    def _write_outcome(self) -> Future[RunSummary]:
        def write() -> RunSummary:
            summary = RunSummary.read(self.folder)
            summary.write()
            return summary

        pool = ThreadPoolExecutor(1)
        self.outcome = pool.submit(write)
        pool.shutdown(wait=False)
        return self.outcome

    def summary(self) -> None:
        """Where things are and what came out, from the run folder alone."""
        summary = (self.outcome or self._write_outcome()).result()
        since = f" (since step {self.first_step})" if self.first_step else ""
        rows = [*summary.rows(), ("time", f"{(time.time() - self.started) / 60:.1f} min{since}")]
        width = max(len(name) for name, _ in rows)
        self.console.print("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows), soft_wrap=True)


def _mean_accuracy(line: Mapping[str, Any]) -> str | None:
    """ "arithmetic Avg@16 0.312" for each validation set of a metrics line."""
    return "  ".join(f"{label} {value:.3f}" for label, value in accuracies(line).values()) or None


def _masked_text(line: Mapping[str, Any]) -> str:
    masked = line.get("trust_region/masked")
    if masked is None:
        return "masked -"
    token = line.get("trust_region/masked_by_token", 0.0)
    prefix = line.get("trust_region/masked_by_prefix", 0.0)
    return f"masked {masked:6.2%} (token {token:.2%}, prefix {prefix:.2%})"
