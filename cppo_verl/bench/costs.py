"""``cppo bench --costs FOLDER``: what is ours, measured from small to large; goes on where it was."""

import json
from pathlib import Path

from cppo_verl.bench.cells import RECORDS, grid, memory_limit, record_of, records, summary, title, too_large
from cppo_verl.bench.measured import measure_cells
from cppo_verl.bench.tables import markdown
from cppo_verl.bench.timing import Effort
from cppo_verl.problems import ConfigError
from cppo_verl.run.files import write_atomically, write_lines
from cppo_verl.run.folder import MANIFEST
from cppo_verl.run.machine import has_gpu
from cppo_verl.run.manifest import manifest
from cppo_verl.run.supervisor import locked

_EFFORT = Effort(rounds=15, seconds=20)


def costs(folder: Path) -> int:
    """Measure what is missing in ``folder`` and print the tables; returns the exit status."""
    folder = folder.absolute()
    with locked(folder) as free:
        if not free:
            return 2
        made = folder / MANIFEST
        if made.exists() and not (folder / RECORDS).exists():
            raise ConfigError(f"--costs {folder}: {made} is of something else; give a folder of its own")
        finished = records(folder)
        # Without a last line that a kill cut off.
        write_lines(folder / RECORDS, finished)
        write_atomically(made, json.dumps(manifest(["cppo", "bench", "--costs", str(folder)]), indent=2) + "\n")
        missing = [cell for cell in grid(has_gpu()) if record_of(cell, finished) is None]
        limit = memory_limit()
        for cell in missing:
            if reason := too_large(cell, limit):
                print(f"left out  {title(cell)}: {reason}")
        fitting = [cell for cell in missing if too_large(cell, limit) is None]
        status = measure_cells(folder, fitting, _EFFORT, summary, {})
        if status == 0:
            text = markdown(records(folder))
            write_atomically(folder / "costs.md", text)
            print(f"\n{text}")
        return status
