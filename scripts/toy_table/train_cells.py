"""``python train_cells.py FOLDER``: train the cells that FOLDER lacks, several at a time, and print the tables."""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from rows import MODES, PLAIN, ROWS, Cell, Column, assets, cells
from tables import report

from cppo_verl.problems import ConfigError
from cppo_verl.run import lifeline
from cppo_verl.run.manifest import manifest
from cppo_verl.run.supervisor import locked
from cppo_verl.run.terminal import say, warn

# Of the process that trains: verl's platform, and one thread, for as many cells are trained at a time as cores are.
_ENVIRONMENT = {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# Of python -m cppo_verl.quickstart, as recipes/quickstart.sh takes them.
_FLAGS = os.environ.get("CPPO_QUICKSTART_FLAGS", "")


def main() -> int:
    """Parse, train, report; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="train_cells.py",
        description="Train the cells that FOLDER lacks and print its tables. Given again, it goes on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    groups = ", ".join(ROWS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", nargs="+", default=["table1"], help=f"rows, or groups of them: {groups}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="of task, model and training")
    parser.add_argument("--lr", default="3e-4", help="learning rate")
    parser.add_argument("--staleness", type=int, default=4, help="steps by which the rollouts are old (not in *_async)")
    parser.add_argument("--on", choices=[PLAIN, *MODES], default=PLAIN, help="the plain loop, or cppo train in a mode")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="cells trained at a time (plain loop)")
    asked = parser.parse_args()
    root = asked.folder.absolute()
    try:
        wanted = cells(Column(asked.lr, asked.staleness, asked.on), asked.rows, asked.seeds)
    except KeyError as error:
        known = [name for group in ROWS.values() for name in group]
        parser.error(f"--rows: no row or group {error}; rows: {', '.join(known)}; groups: {groups}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with locked(root) as free:
        if not free:
            return 2
        for seed in asked.seeds:  # nothing where it is there
            flags = ["--out", str(assets(root, seed)), "--seed", str(seed), *shlex.split(_FLAGS)]
            subprocess.run([sys.executable, "-m", "cppo_verl.quickstart", *flags], check=True)
        for unfinished in root.glob("lr*/.*-seed*"):
            shutil.rmtree(unfinished)
        missing = [cell for cell in wanted if not cell.is_done(root, asked.steps)]
        train = _train if asked.on == PLAIN else _train_on_the_stack
        failed = train(root, missing, asked.steps, asked.workers)
    report(root)
    return int(failed > 0)


def _train(root: Path, missing: list[Cell], steps: int, workers: int) -> int:
    """Returns how many cells failed, each of which was told."""
    if not missing:
        return 0
    say(f"{len(missing)} cells to train, {workers} at a time")
    os.environ |= _ENVIRONMENT
    begun, failed, made = time.monotonic(), 0, manifest(sys.argv)
    with ProcessPoolExecutor(min(workers, len(missing)), get_context("spawn"), _quiet, (root,)) as pool:
        futures = {pool.submit(_cell, root, cell, steps, made): cell for cell in missing}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                cell, minutes = futures[future], (time.monotonic() - begun) / 60
                try:
                    last = future.result()
                except BrokenProcessPool:
                    raise ConfigError(f"a training process died (memory?); see {root}/logs, then go on") from None
                except Exception as error:
                    failed += 1
                    warn(f"{cell.row} seed {cell.seed} failed: {type(error).__name__}: {error}; see {root}/logs")
                else:
                    left = minutes / number * (len(missing) - number)
                    say(f"{number}/{len(missing)}  {cell.column.name}  {cell.row} seed {cell.seed}: {last:.1%}  "
                        f"{minutes:.0f} min, about {left:.0f} left")  # fmt: skip
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.kill()
            raise
    return failed


def _train_on_the_stack(root: Path, missing: list[Cell], steps: int, _: int) -> int:
    """By ``cppo train``, one after the other; returns how many failed. A cell that was cut off is continued."""
    failed = 0
    (root / "logs").mkdir(exist_ok=True)
    for number, cell in enumerate(missing, 1):
        log, begun = root / "logs" / f"{cell.column.name}-{cell.row}-seed{cell.seed}.log", time.monotonic()
        command = [str(Path(sys.executable).parent / "cppo"), "train", *cell.overrides(root, steps), "run.resume=auto"]
        with open(log, "a") as file:
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        failed += status != 0
        outcome = f"{(time.monotonic() - begun) / 60:.0f} min" if status == 0 else f"failed; see {log}"
        say(f"{number}/{len(missing)}  {cell.column.name}  {cell.row} seed {cell.seed}: {outcome}")
    return failed


def _quiet(root: Path) -> None:
    """What verl prints goes to a file, of each process its own; none outlives the command."""
    lifeline.tie()
    (root / "logs").mkdir(exist_ok=True)
    log = os.open(root / "logs" / f"process-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from cppo_verl.adapters.actor.alone import join_process_group

    join_process_group()


def _cell(root: Path, cell: Cell, steps: int, made: dict[str, Any]) -> float:
    from cell import train

    return train(cell.overrides(root, steps), cell.folder(root), made)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ConfigError as error:
        warn(f"train_cells.py: {error}")
        raise SystemExit(2) from None
