"""The process that measures a plan: ``python -m cppo_verl.bench.measure.process FOLDER``, one JSON line a cell."""

import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path

from cppo_verl.bench.cells import MODULES, RECORDS, Cell, read_plan
from cppo_verl.bench.timing import Effort, interleaved
from cppo_verl.run import lifeline
from cppo_verl.run.log import RunLog


def measure(cell: Cell, effort: Effort) -> Cell:
    """The record of ``cell``: itself, the seconds of each call by name, and the circumstances."""
    import torch

    module = import_module(f"cppo_verl.bench.measure.{MODULES[cell['part']]}")
    load = os.getloadavg()[0]
    functions, facts = getattr(module, cell["part"])(cell)
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds = interleaved({name: functions[name] for name in cell.get("variants", functions)}, effort, wait)
    rounded = {name: [float(f"{value:.4g}") for value in values] for name, values in seconds.items()}
    circumstances = {"threads": torch.get_num_threads(), "load": round(load, 1), "date": time.strftime("%Y-%m-%d")}
    if torch.cuda.is_available():
        circumstances["gpu"] = torch.cuda.get_device_name()
    return {**cell, **circumstances, **facts, "seconds": rounded}


def main(folder: Path) -> None:
    lifeline.heed()
    cells, effort = read_plan(folder)
    with RunLog(folder).outcome():
        for cell in cells:
            line = json.dumps(measure(cell, effort)) + "\n"
            with open(folder / RECORDS, "a") as file:
                file.write(line)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
