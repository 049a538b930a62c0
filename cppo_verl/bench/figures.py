"""What ``cppo bench`` measured: median ratios of each timing with intervals, computed from a run's bench.jsonl."""

import json
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap

from cppo_verl.run.log import read_lines

# One line a step, in the run folder.
STEPS_FILE = "bench.jsonl"

# What a line of bench.jsonl measures, and in which unit.
_BENCH_MEASURES = {"step": "s", "gen_per_token": "s", "update_actor": "s", "peak_memory_gb": "GiB"}


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
            ratios = np.array([entry["ours"][measure] / entry[other][measure] for entry in complete])
            interval = bootstrap((ratios,), np.median, confidence_level=0.95, rng=0).confidence_interval
            medians = {name: float(np.median([entry[name][measure] for entry in complete])) for name in ("ours", other)}
            figures.append(
                {
                    "against": other,
                    "measure": measure,
                    "rounds": len(complete),
                    "median_ratio": float(np.median(ratios)),
                    "low": float(interval.low),
                    "high": float(interval.high),
                    "medians": medians,
                }
            )
            rows.append(
                (
                    f"{measure} / {other}",
                    f"{np.median(ratios):.3f} (95% {interval.low:.3f} to {interval.high:.3f}, {len(complete)} rounds; "
                    f"{medians['ours']:.3g} {unit} against {medians[other]:.3g} {unit})",
                )
            )
    (folder / "bench.json").write_text(json.dumps(figures, indent=2) + "\n")
    return rows
