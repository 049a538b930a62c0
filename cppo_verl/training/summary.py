"""What came out of a run, computed from its folder: validation before and after, masked tokens, plots."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cppo_verl.evaluation.validation import validations, verdicts
from cppo_verl.run.dumps import dumps_of
from cppo_verl.run.files import write_atomically
from cppo_verl.run.folder import CONFIG
from cppo_verl.run.log import METRICS, read_metrics
from cppo_verl.training.reward_signal import verdict

# Outcomes in which the grader gave no verdict.
_UNJUDGED = ("timeout", "error")


@dataclass(frozen=True)
class ValidationChange:
    """Avg@k of one validation set at the first and the last validation; the same problems, paired."""

    source: str
    samples: int
    problems: int
    first_step: int
    last_step: int
    before: float
    after: float
    difference: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class RunSummary:
    """Summary of a run folder."""

    folder: Path
    steps: dict[int, dict[str, Any]]
    changes: list[ValidationChange]

    @classmethod
    def read(cls, folder: Path) -> "RunSummary":
        return cls(folder, read_metrics(folder), validation_changes(folder / "validation"))

    def trained(self) -> list[dict[str, Any]]:
        return [line for line in self.steps.values() if "training/global_step" in line]

    def masked(self) -> dict[str, float] | None:
        """Share of all trained tokens masked, by cause, over the whole run."""
        lines = [line for line in self.trained() if line.get("trust_region/tokens")]
        if not lines:
            return None
        tokens = sum(line["trust_region/tokens"] for line in lines)
        by_token = sum(line["trust_region/masked_by_token"] * line["trust_region/tokens"] for line in lines)
        masked = sum(line["trust_region/masked_tokens"] for line in lines)
        return {"masked": masked / tokens, "token": by_token / tokens, "prefix": (masked - by_token) / tokens}

    def rows(self) -> list[tuple[str, str]]:
        """Lines of the terminal summary."""
        rows = [("run", str(self.folder)), ("steps", str(len(self.trained())))]
        for change in self.changes:
            rows.append(
                (
                    f"{change.source} Avg@{change.samples}",
                    f"{change.before:.1%} -> {change.after:.1%}   {100 * change.difference:+.1f} points "
                    f"(95% interval {100 * change.low:+.1f} to {100 * change.high:+.1f}, {change.problems} problems)",
                )
            )
        for name in ("rollout", "validation"):
            missing = sum(line.get(f"{name}/missing_responses") or 0 for line in self.steps.values())
            if missing:
                rows.append((f"failed {name}", f"{missing} responses could not be generated or graded (see the log)"))
        unjudged = {name: sum(line.get(f"grading/{name}") or 0 for line in self.trained()) for name in _UNJUDGED}
        if any(unjudged.values()):
            counts = ", ".join(f"{count} {name}" for name, count in unjudged.items() if count)
            rows.append(("failed grading", f"{counts} (scored 0; see docs/grading.md)"))
        if silent := verdict(self.trained()):
            rows.append(("no signal", silent))
        masked = self.masked()
        if masked:
            rows.append(
                (
                    "masked tokens",
                    f"{masked['masked']:.2%} (token {masked['token']:.2%}, prefix {masked['prefix']:.2%})",
                )
            )
        page = self.folder / "inspect.html"
        if page.exists():
            rows.append(("inspect", str(page)))
        elif dumps_of(self.folder):
            rows.append(("inspect", f"cppo inspect {self.folder} makes a page of the dumped steps"))
        for name in (METRICS, CONFIG, "validation", "checkpoints", "plots", "logs"):
            if (self.folder / name).exists():
                rows.append((name.removesuffix(".jsonl"), str(self.folder / name)))
        return rows

    def write(self) -> None:
        """``summary.json`` and ``plots/`` in the run folder."""
        from cppo_verl.figures.plots import plot_runs

        plot_runs([self.folder], self.folder / "plots", formats=["png"])
        content = {"masked": self.masked(), "validation": [vars(change) for change in self.changes]}
        write_atomically(self.folder / "summary.json", json.dumps(content, indent=2) + "\n")


def validation_changes(folder: Path) -> list[ValidationChange]:
    """First against last validation of a run, for every data source that both have."""
    # Not at a start, where nobody is to wait half a second for scipy.
    from cppo_verl.evaluation.statistics import avg_at_k, paired_difference

    files = validations(folder)
    if len(files) < 2:
        return []
    first, last = min(files), max(files)
    before, after = verdicts(files[first]), verdicts(files[last])
    changes = []
    for source in sorted(before.keys() & after.keys()):
        # Only problems with every sample at both ends are paired; missing samples are a metric of their own.
        samples = max(len(row) for row in [*before[source].values(), *after[source].values()])
        problems = [
            problem
            for problem, row in sorted(before[source].items())
            if len(row) == len(after[source].get(problem, ())) == samples
        ]
        if len(problems) < 2:
            continue
        a = np.array([before[source][problem] for problem in problems], dtype=bool)
        b = np.array([after[source][problem] for problem in problems], dtype=bool)
        difference, low, high, p_value = paired_difference(b, a)
        changes.append(
            ValidationChange(
                source, a.shape[1], len(problems), first, last, avg_at_k(a), avg_at_k(b), difference, low, high, p_value
            )
        )
    return changes
