"""Which of a run's checkpoints are complete, and which are kept. Standard library only.

verl writes ``checkpoints/global_step_N`` file by file. What a kill leaves half-written has no ``complete.json`` and is
never resumed from; the file also keeps the step's metrics, which verl logs only after saving and validating.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cppo_verl.run.files import DamagedFile, read_json, sync_tree, write_atomically
from cppo_verl.run.log import plain_metrics

_COMPLETE = "complete.json"
_STEP = re.compile(r"global_step_(\d+)")


def step_folder(checkpoints: str | Path, step: int) -> Path:
    return Path(checkpoints) / f"global_step_{step}"


def complete(folder: Path, step: int, metrics: Mapping[str, Any]) -> None:
    """After the last file of a checkpoint was written: they are on disk before the one that says so."""
    sync_tree(folder)
    write_atomically(folder / _COMPLETE, json.dumps({"step": step, "metrics": plain_metrics(metrics)}) + "\n")


def is_complete(folder: Path) -> bool:
    """Whether it was written to its end, which a damaged ``complete.json`` does not say."""
    try:
        return bool(_marker(folder))
    except DamagedFile:
        return False


def metrics_of(folder: Path) -> dict[str, Any]:
    """The step's metrics as they were when the checkpoint was completed; none of an incomplete one.

    Raises:
        DamagedFile: ``complete.json`` does not tell.
    """
    return _marker(folder).get("metrics", {})


def _marker(folder: Path) -> dict[str, Any]:
    path = folder / _COMPLETE
    if not path.is_file():
        return {}
    remedy = f"whether the checkpoint is whole cannot be told: use another one, and move {folder} away"
    return read_json(path, remedy, "step", "metrics")


def step_folders(checkpoints: str | Path) -> dict[int, Path]:
    """Every ``global_step_N`` by step, ascending; complete or not, a folder or a symbolic link."""
    folders = Path(checkpoints).glob("global_step_*")
    return dict(sorted((int(found[1]), folder) for folder in folders if (found := _STEP.fullmatch(folder.name))))


def complete_steps(checkpoints: str | Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    return [step for step, folder in step_folders(checkpoints).items() if is_complete(folder)]


def damaged(checkpoints: str | Path) -> Iterator[tuple[int, DamagedFile]]:
    """(step, error) of every ``complete.json`` that cannot be read."""
    for step, folder in step_folders(checkpoints).items():
        try:
            _marker(folder)
        except DamagedFile as error:
            yield step, error


def remove(folder: Path) -> None:
    """Delete a checkpoint; killed half-way it is incomplete. A symbolic link and what it leads to are not touched."""
    if folder.is_symlink():
        return
    (folder / _COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def prune(checkpoints: str | Path, keep: int | None, scores: Mapping[int, float]) -> list[int]:
    """Remove all complete checkpoints but the newest ``keep`` and the best validated one; returns the removed steps.

    Symbolic links stay.

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
    folders = {step: step_folder(checkpoints, step) for step in steps if step not in kept}
    removed = [step for step, folder in folders.items() if not folder.is_symlink()]
    for step in removed:
        remove(folders[step])
    return removed
