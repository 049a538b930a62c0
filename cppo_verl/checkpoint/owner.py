"""Whose a folder of checkpoints is: one run's, which alone writes and removes there."""

import json
from pathlib import Path

from cppo_verl.problems import ConfigError
from cppo_verl.run.files import read_json
from cppo_verl.run.folder import run_of

# Names the run that writes to a folder outside its own.
_OWNER = "run.json"


def other_owner(folder: Path, run: Path) -> str | None:
    """What is wrong with ``run`` writing to ``folder``: the words for another run's claim, or None.

    A folder is the run's in whose folder it lies, else the run's that its ``run.json`` names.

    Raises:
        DamagedFile: that file cannot be read.
    """
    folder, run = folder.resolve(), run.resolve()
    nearest = run_of(folder)
    if folder.is_relative_to(run):
        inside = nearest is not None and nearest != run and nearest.is_relative_to(run)
        return f"it belongs to the run {nearest}" if inside else None
    if nearest is not None:
        return f"it belongs to the run {nearest}"
    file = folder / _OWNER
    if not file.is_file():
        return None
    named = read_json(file, "delete it if no run uses the folder any more", "run")["run"]
    return None if named == str(run) else f"it belongs to the run {named} ({file} says so)"


def claim(folder: Path, run: Path) -> None:
    """Make ``folder`` this run's. Raises ConfigError where another run is faster."""
    if folder.resolve().is_relative_to(run.resolve()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(folder / _OWNER, "x") as file:
            file.write(json.dumps({"run": str(run.resolve())}) + "\n")
    except FileExistsError:
        if owner := other_owner(folder, run):
            raise ConfigError(f"trainer.default_local_dir={folder}: {owner}; give a folder of its own") from None
