"""``cppo bench --quick``: ratios of ours to a reference in the same process, against the committed ones.

Seconds differ between machines, and a machine's from day to day; a ratio of two things that were timed in turn hardly.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from cppo_verl.bench.cells import QWEN3_VOCABULARY, Cell, record_of, records
from cppo_verl.bench.measured import measure_cells
from cppo_verl.bench.timing import Effort
from cppo_verl.problems import ConfigError
from cppo_verl.run.files import write_atomically
from cppo_verl.run.machine import cpu_name, has_gpu
from cppo_verl.run.manifest import manifest
from cppo_verl.run.supervisor import INTERRUPTED

RATIOS = Path(__file__).with_name("ratios.json")

_EFFORT = Effort(rounds=101, seconds=6, at_least=15)
# One thread, and vLLM's engine in the measuring process: fewer others to wait for.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# Measurements behind a limit: so many by themselves, and as many beside a busy process for each core.
_RUNS = 3
# A limit is below this multiple of the median, so that a slowdown to twice the time is seen.
_AT_MOST = 1.8


class Guard(NamedTuple):
    """A ratio that is watched."""

    sizes: Cell
    ours: str
    reference: str
    margin: float
    """The limit is at least so many times the median."""

    @property
    def cell(self) -> Cell:
        """With nothing timed but these two."""
        return {**self.sizes, "variants": [self.reference, self.ours]}


# Where both sides run the same machinery around what is ours, machines differ less.
GUARDS = {
    "mask / reading its tensors once": Guard({"part": "mask", "responses": 4, "tokens": 1024}, "mask", "read", 1.5),
    "calibrated budget / sort": Guard({"part": "quantile", "responses": 64, "tokens": 4096}, "quantile", "sort", 1.5),
    "Top-K gather / log-softmax": Guard(
        {"part": "gather", "vocabulary": QWEN3_VOCABULARY, "dtype": "float32", "tokens": 1024, "k": 20},
        "hook",
        "log_softmax",
        1.5,
    ),
    "update of a minibatch / stock GRPO": Guard(
        {"part": "update", "vocabulary": 55, "responses": 32, "tokens": 32, "k": 20}, "ours", "stock", 1.3
    ),
    "validation statistics / verl's": Guard({"part": "validation", "problems": 2, "samples": 8}, "ours", "verl", 1.5),
    "rollout with K = 20 / K = 0": Guard(
        {"part": "rollout", "vocabulary": 55, "responses": 32, "tokens": 24}, "K=20", "K=0", 1.3
    ),
}


def quick(write: bool) -> int:
    """Measure, compare and print; 1 where a ratio is above its limit. ``write``: renew the committed file instead."""
    if has_gpu():
        raise ConfigError("--quick compares with ratios of the CPU stack; on a GPU measure with --costs")
    if write:
        return _renew()
    committed = json.loads(RATIOS.read_text())
    measured = measure(GUARDS)
    above = [name for name in GUARDS if measured[name] > committed["ratios"][name]["limit"]]
    if above:
        print(f"\nabove the limit, measured once more: {', '.join(above)}")
        again = measure({name: GUARDS[name] for name in above})
        measured = measured | {name: min(measured[name], again[name]) for name in above}
    text, failed = comparison(measured, committed)
    print(f"\n{text}")
    return 1 if failed else 0


def measure(guards: Mapping[str, Guard]) -> dict[str, float]:
    """The median over rounds of each ratio."""
    names = {guard.cell["part"]: name for name, guard in guards.items()}
    with TemporaryDirectory(prefix="cppo-bench-") as directory:
        folder = Path(directory)
        cells = [guard.cell for guard in guards.values()]
        status = measure_cells(folder, cells, _EFFORT, lambda record: names[record["part"]], _ENVIRONMENT)
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        if status != 0:
            log = folder / "bench.log"
            tail = log.read_text(errors="replace").splitlines()[-20:] if log.exists() else []
            raise ConfigError("\n".join(["the ratios could not be measured; the end of the log:", *tail]))
        return {name: median_ratio(guard, records(folder)) for name, guard in guards.items()}


def median_ratio(guard: Guard, finished: Sequence[Cell]) -> float:
    """Of ours to the reference, over the rounds of the guard's record."""
    record = record_of(guard.cell, finished)
    assert record is not None
    seconds = record["seconds"]
    return float(np.median(np.divide(seconds[guard.ours], seconds[guard.reference])))


def comparison(measured: Mapping[str, float], committed: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The table, and the names of the ratios above their limits."""
    lines = [f"{'ratio':<36} {'measured':>9} {'committed':>10} {'limit':>9}"]
    failed = []
    for name, value in measured.items():
        known = committed["ratios"][name]
        over = not value <= known["limit"]  # NaN too
        failed += [name] * over
        verdict = f"  ABOVE: {value / known['median']:.2f} times the committed ratio" if over else ""
        lines.append(f"{name:<36} {value:>9.3g} {known['median']:>10.3g} {known['limit']:>9.3g}{verdict}")
    lines.append(f"{len(failed)} of {len(measured)} above their limits of {committed['date']}, {committed['cpu']}")
    return "\n".join(lines), failed


def limits(alone: Sequence[Mapping[str, float]], beside: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Median, highest value and limit of each ratio, from runs alone and runs beside busy processes."""
    found = {}
    for name in alone[0]:
        median = float(np.median([run[name] for run in alone]))
        highest = max(run[name] for run in [*alone, *beside])
        limit = min(max(GUARDS[name].margin * median, 1.15 * highest), _AT_MOST * median)
        rounded = {"median": median, "highest": highest, "limit": limit}
        found[name] = {key: float(f"{value:.3g}") for key, value in rounded.items()}
    return found


def _renew() -> int:
    runs = []
    for number in range(2 * _RUNS):
        busy = os.cpu_count() or 1 if number >= _RUNS else 0
        print(f"\nrun {number + 1} of {2 * _RUNS}, beside {busy} busy processes")
        with _busy_processes(busy):
            runs.append(measure(GUARDS))
        print(", ".join(f"{name} {value:.3g}" for name, value in runs[-1].items()))
    made = manifest(["cppo", "bench", "--quick", "--write"])
    content = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": made["commit"],
        "cpu": cpu_name(),
        "median": f"of {_RUNS} runs by themselves",
        "highest": f"of those and {_RUNS} beside a busy process for each core",
        "limit": f"1.5 medians (update, rollout: 1.3) or 1.15 times the highest; at most {_AT_MOST} medians",
        "ratios": limits(runs[:_RUNS], runs[_RUNS:]),
    }
    write_atomically(RATIOS, json.dumps(content, indent=2) + "\n")
    print(f"\n{RATIOS}\n{RATIOS.read_text()}")
    return 0


@contextmanager
def _busy_processes(count: int) -> Iterator[None]:
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()
