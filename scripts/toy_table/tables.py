"""What the cells of a folder came to: a line a cell for keeping, and a table a column with differences by seed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rows import ROWS
from scipy import stats

from cppo_verl.run.files import write_atomically, write_lines
from cppo_verl.run.folder import CONFIG, read_attempts, read_config
from cppo_verl.run.log import read_metrics, validation_score
from cppo_verl.run.terminal import say

RECORDS, TABLE = "toy_table.jsonl", "toy_table.md"
REFERENCE = "cppo"
Record = Mapping[str, Any]


def records(root: Path) -> list[Record]:
    """One a finished cell, in the order of :data:`ROWS`."""
    order = [name for group in ROWS.values() for name in group]
    runs = [file.parent for file in root.glob(f"lr*/*/{CONFIG}") if not file.parent.name.startswith(".")]
    found = [record for run in runs if (record := _record(run))]
    return sorted(found, key=lambda record: (record["column"], order.index(record["row"]), record["seed"]))


def _record(run: Path) -> Record | None:
    row, _, seed = run.name.rpartition("-seed")
    config, steps = read_config(run), read_metrics(run)
    scores = {step: score for step, line in steps.items() if (score := validation_score(line)) is not None}
    if max(scores, default=0) < config.trainer.total_training_steps:
        return None

    def mean(name: str) -> float | None:
        values = [line[name] for line in steps.values() if name in line]
        return float(np.mean(values)) if values else None

    seconds = [line["timing_s/step"] for line in steps.values() if "timing_s/step" in line]
    attempt = read_attempts(run)[-1]
    return {
        "column": run.parent.name,
        "row": row,
        "seed": int(seed),
        "accuracy": scores,
        "masked": mean("trust_region/masked"),
        "masked_by_prefix": mean("trust_region/masked_by_prefix"),
        "divergence": config.divergence.name,
        "mean_divergence": mean("divergence/mean"),
        "seconds_a_step": float(np.median(seconds)),
        "commit": attempt["commit"],
        "started": attempt["started"],
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of values of several seeds and half of its 95% t-interval, NaN for one seed."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(half)


def tables(found: Sequence[Record]) -> Iterator[str]:
    """Markdown, one table a column."""
    for column in dict.fromkeys(record["column"] for record in found):
        here = [record for record in found if record["column"] == column]
        steps = _quarters(here)
        headings = ["row", "seeds", *(f"step {step}" for step in steps), "best", "last", "last / best",
                    f"last - {REFERENCE}, same seeds", "masked", "by prefix", "mean D"]  # fmt: skip
        lines = [headings, ["---", *["---:"] * (len(headings) - 1)]]
        for row in dict.fromkeys(record["row"] for record in here):
            lines.append(_line(row, here, steps))
        yield f"### {column}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _quarters(found: Sequence[Record]) -> list[int]:
    """The start and the quarters of the training, as far as all cells were validated there."""
    shared = set.intersection(*(set(record["accuracy"]) for record in found))
    last = max(shared)
    return [step for step in (0, last // 4, last // 2, 3 * last // 4) if step in shared]


def _line(row: str, column: Sequence[Record], steps: Sequence[int]) -> list[str]:
    own = {record["seed"]: record["accuracy"] for record in column if record["row"] == row}
    others = {record["seed"]: record["accuracy"] for record in column if record["row"] == REFERENCE}
    last = {seed: scores[max(scores)] for seed, scores in own.items()}
    best = [max(scores.values()) for scores in own.values()]
    differences = [last[seed] - others[seed][max(others[seed])] for seed in last if seed in others]
    masked = [record for record in column if record["row"] == row and record["masked"] is not None]
    distances = [record["mean_divergence"] for record in column if record["row"] == row]
    kind = next(record["divergence"] for record in column if record["row"] == row)
    return [
        row,
        str(len(own)),
        *(_percent(np.mean([scores[step] for scores in own.values()])) for step in steps),
        _percent(np.mean(best)),
        _with_half(*interval(list(last.values()))),
        f"{np.mean([last[seed] / max(own[seed].values()) for seed in own]):.2f}",
        _with_half(*interval(differences), sign=True) if differences and row != REFERENCE else "",
        f"{np.mean([record['masked'] for record in masked]):.2%}" if masked else "",
        f"{np.mean([record['masked_by_prefix'] for record in masked]):.2%}" if masked else "",
        f"{np.mean(distances):.4f}{'' if kind == 'topk_tv' else f' ({kind})'}" if None not in distances else "",
    ]


def _percent(value: float | np.floating[Any]) -> str:
    return f"{100 * value:.1f}"


def _with_half(mean: float, half: float, sign: bool = False) -> str:
    number = f"{100 * mean:+.1f}" if sign else _percent(mean)
    return number if math.isnan(half) else f"{number} ± {100 * half:.1f}"


def report(root: Path) -> None:
    """Write the records and the tables of ``root`` and print the latter."""
    found = records(root)
    if not found:
        return
    write_lines(root / RECORDS, found)
    note = (
        "Accuracy on held-out problems in percent, means over seeds; ± 95% over seeds. Masked: mean over the steps of "
        "the share of tokens whose gradient has a factor below 1 (soft-gate, drpo, sapo: any attenuation). "
        "D: mean over tokens and steps, topk_tv where nothing else is named."
    )
    text = "\n\n".join([*tables(found), note])
    write_atomically(root / TABLE, f"{text}\n")
    say(text)
