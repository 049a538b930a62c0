"""Which of a run's checkpoints are complete, and which are kept. Standard library only.

verl writes ``checkpoints/global_step_N`` file by file. What a kill leaves half-written has no ``complete.json`` and is
never resumed from; the file also keeps the step's metrics, which verl logs only after saving and validating.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cppo_verl.run.log import plain_metrics, write_atomically

_COMPLETE = "complete.json"
_STEP = re.compile(r"global_step_(\d+)")


def step_folder(checkpoints: str | Path, step: int) -> Path:
    return Path(checkpoints) / f"global_step_{step}"


def complete(folder: Path, step: int, metrics: Mapping[str, Any]) -> None:
    """After the last file of a checkpoint was written."""
    write_atomically(folder / _COMPLETE, json.dumps({"step": step, "metrics": plain_metrics(metrics)}) + "\n")


def is_complete(folder: Path) -> bool:
    return (folder / _COMPLETE).is_file()


def metrics_of(folder: Path) -> dict[str, Any]:
    """The step's metrics as they were when the checkpoint was completed."""
    return json.loads((folder / _COMPLETE).read_text())["metrics"]


def complete_steps(checkpoints: str | Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    folders = Path(checkpoints).glob("global_step_*")
    return sorted(
        int(found[1]) for folder in folders if (found := _STEP.fullmatch(folder.name)) and is_complete(folder)
    )


def remove(folder: Path) -> None:
    """Delete a checkpoint; killed half-way it is incomplete."""
    (folder / _COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def prune(checkpoints: str | Path, keep: int | None, scores: Mapping[int, float]) -> list[int]:
    """Remove all complete checkpoints but the newest ``keep`` and the best validated one; returns the removed steps.

    Args:
        keep: None keeps all.
        scores: validation accuracy by step; of equal ones the earliest step is the best.
    """
    steps = complete_steps(checkpoints)
    if keep is None:
        return []
    kept = set(steps[-keep:])
    if scored := [step for step in steps if step in scores]:
        kept.add(max(scored, key=lambda step: (scores[step], -step)))
    removed = [step for step in steps if step not in kept]
    for step in removed:
        remove(step_folder(checkpoints, step))
    return removed
