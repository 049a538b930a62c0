"""What ``cppo bench`` measured: median ratios of each timing with intervals, computed from a run's bench.jsonl."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap

from cppo_verl.run.files import read_lines, write_atomically

# One line a step, in the run folder.
STEPS_FILE = "bench.jsonl"

# What a line of bench.jsonl measures, and in which unit.
_BENCH_MEASURES = {"step": "s", "gen_per_token": "s", "update_actor": "s", "peak_memory_gb": "GiB"}


class Ratio(NamedTuple):
    """A median of paired ratios with its 95% bootstrap interval over rounds."""

    median: float
    low: float
    high: float


def paired_ratio(ours: Sequence[float], other: Sequence[float]) -> Ratio:
    """Of what was measured in the same rounds."""
    ratios = np.divide(ours, other)
    interval = bootstrap((ratios,), np.median, confidence_level=0.95, rng=0).confidence_interval
    return Ratio(float(np.median(ratios)), float(interval.low), float(interval.high))


def summarize(folder: Path) -> list[tuple[str, str]]:
    """Median ratio "ours / other" of each timing with its 95% bootstrap interval over rounds; also in bench.json."""
    rounds: dict[int, dict[str, dict[str, float]]] = {}
    for line in read_lines(folder / STEPS_FILE):
        rounds.setdefault(line["round"], {})[line["variant"]] = line
    variants = {variant for entry in rounds.values() for variant in entry}
    complete = [entry for entry in rounds.values() if len(entry) == len(variants)]
    figures, rows = [], []
    for other in sorted(variants - {"ours"}):
        for measure, unit in _BENCH_MEASURES.items():
            values = {name: [entry[name][measure] for entry in complete] for name in ("ours", other)}
            ratio = paired_ratio(values["ours"], values[other])
            medians = {name: float(np.median(found)) for name, found in values.items()}
            figures.append(
                {
                    "against": other,
                    "measure": measure,
                    "rounds": len(complete),
                    "median_ratio": ratio.median,
                    "low": ratio.low,
                    "high": ratio.high,
                    "medians": medians,
                }
            )
            rows.append(
                (
                    f"{measure} / {other}",
                    f"{ratio.median:.3f} (95% {ratio.low:.3f} to {ratio.high:.3f}, {len(complete)} rounds; "
                    f"{medians['ours']:.3g} {unit} against {medians[other]:.3g} {unit})",
                )
            )
    write_atomically(folder / "bench.json", json.dumps(figures, indent=2) + "\n")
    return rows
