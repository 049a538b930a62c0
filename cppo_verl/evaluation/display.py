"""What a person sees of an evaluation while it samples: a bar, or a line now and then."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cppo_verl.evaluation.samples import Evaluation
from cppo_verl.run.failure import Failure
from cppo_verl.run.terminal import plain


class SamplingDisplay:
    """Progress of one evaluation on the terminal; with output to a file or a pipe, a line now and then."""

    def __init__(self, evaluation: Evaluation, log_file: Path, console: Console) -> None:
        self.total = evaluation.n * len(evaluation.questions)
        self.verdicts = [sample.outcome == "right" for sample in evaluation.samples.values()]
        self.evaluation, self.log_file, self.console = evaluation, log_file, console
        self.failure = Failure(log_file)
        self.started = self.printed = time.time()
        columns = (TextColumn("{task.description}", markup=False), BarColumn(24), MofNCompleteColumn())
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
            self.progress.update(self.task, description=plain(event["event"]))
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
