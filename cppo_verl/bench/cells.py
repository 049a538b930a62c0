"""What ``cppo bench --costs`` and ``--quick`` measure: cells, each a part of ours at one size, and their records."""

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from cppo_verl.bench.timing import Effort
from cppo_verl.run.files import read_lines, write_atomically
from cppo_verl.run.machine import gpus

# A part and its sizes, and "variants" where not all of its functions are timed; the record of a finished one also has
# "seconds", a list for each function that was.
Cell = dict[str, Any]

PLAN, RECORDS = "plan.json", "costs.jsonl"

# The module that measures a part. Each runs in a process of its own, a rollout's in one for each engine.
MODULES = {
    "mask": "tensors",
    "quantile": "tensors",
    "gather": "tensors",
    "log_prob": "tensors",
    "rollout": "rollout",
    "queue": "transfer",
    "update": "engine",
    "signal": "engine",
    "validation": "engine",
}

# Bytes at the peak for each token of a padded [responses, tokens] batch: seen, rounded up.
_BYTES_A_TOKEN = {"mask": 120, "quantile": 60, "queue": 1000}
# Log-probabilities: logits, their gradient and what the backward pass needs in between.
_COPIES_OF_THE_LOGITS = 4
MEMORY_LIMIT = 4 * 2**30
# Of the first GPU's memory, where there is one.
_SHARE_OF_A_GPU = 0.6

QWEN3_VOCABULARY = 151_936
LENGTHS, RESPONSES = (1024, 4096, 16_384, 65_536), (1, 16, 256, 4096)


def grid(on_gpu: bool) -> list[Cell]:
    """The cells of ``--costs``, small ones first within each part; on a GPU without those that are the host's work."""
    cells: list[Cell] = []
    for part in ("mask", "quantile"):
        cells += [{"part": part, "responses": rows, "tokens": length} for rows in RESPONSES for length in LENGTHS]
    for dtype in ("float32", "bfloat16"):
        for tokens in (1024, 4096, 16_384) if on_gpu else (64, 256, 1024):
            cells.append({"part": "gather", "vocabulary": QWEN3_VOCABULARY, "dtype": dtype, "tokens": tokens, "k": 20})
    for dtype in ("float32", "bfloat16"):
        tokens = 16_384 if on_gpu else 512
        cells.append({"part": "log_prob", "vocabulary": QWEN3_VOCABULARY, "dtype": dtype, "tokens": tokens})
    if on_gpu:
        sizes = {"responses": 32, "tokens": 1008, "micro_batch": 4, "k": 20}
        cells.append({"part": "update", "shape": "Qwen3-1.7B", "vocabulary": QWEN3_VOCABULARY, **sizes})
        return [*cells, _rollout_cell(QWEN3_VOCABULARY, responses=256, tokens=64)]
    for vocabulary in (55, 49_152, QWEN3_VOCABULARY):
        cells.append(_rollout_cell(vocabulary, responses=32, tokens=32))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        cells.append({"part": "signal", "vocabulary": 55, "responses": 64, "tokens": 64, "k": 20, "share": share})
    for dtype in ("float32", "float16"):
        for length in (1024, 4096, 16_384):
            cells.append({"part": "queue", "responses": 16, "tokens": length, "k": 20, "log_prob_dtype": dtype})
    return cells


def _rollout_cell(vocabulary: int, responses: int, tokens: int) -> Cell:
    variants = ["none", "K=0", "K=1", "K=20", "vLLM's K=20"] + ["K=64"] * (vocabulary >= 64)
    return {
        "part": "rollout",
        "vocabulary": vocabulary,
        "responses": responses,
        "tokens": tokens,
        "variants": variants,
    }


def memory_limit() -> float:
    """Bytes that a cell may take: of the first GPU's memory, or of this machine's."""
    cards = gpus()
    if cards:  # "NVIDIA H100 80GB HBM3, 81559 MiB"
        return float(cards[0].rsplit(",", 1)[1].split()[0]) * 2**20 * _SHARE_OF_A_GPU
    return min(MEMORY_LIMIT, psutil.virtual_memory().available)


def too_large(cell: Cell, limit: float) -> str | None:
    """Why a cell is not measured within ``limit`` bytes, or None."""
    tokens, part = cell["tokens"] * cell.get("responses", 1), cell["part"]
    if part in ("gather", "log_prob"):
        size = tokens * cell["vocabulary"] * (4 if cell["dtype"] == "float32" else 2) * _COPIES_OF_THE_LOGITS
    else:
        size = tokens * _BYTES_A_TOKEN.get(part, 0)
    return f"needs about {size / 2**30:.1f} GiB, more than {limit / 2**30:.1f}" if size > limit else None


def title(cell: Cell) -> str:
    """A cell in a line: its part and its sizes."""
    words = [f"{cell[name]:,} {name}" for name in ("vocabulary", "responses", "tokens") if name in cell]
    words += [cell[name] for name in ("dtype", "log_prob_dtype") if name in cell]
    words += [f"{cell['share']:.0%} without a signal"] if "share" in cell else []
    return f"{cell['part']}: {', '.join(words)}"


def summary(record: Cell) -> str:
    """The line of a finished cell: its medians in milliseconds."""
    medians = [f"{name} {statistics.median(values) * 1e3:.3g} ms" for name, values in record["seconds"].items()]
    return f"{title(record)}: {', '.join(medians)}"


def write_plan(folder: Path, cells: Sequence[Cell], effort: Effort) -> None:
    """What the next process measures in ``folder``."""
    write_atomically(folder / PLAN, json.dumps({"cells": cells, "effort": effort}))


def read_plan(folder: Path) -> tuple[list[Cell], Effort]:
    plan = json.loads((folder / PLAN).read_text())
    return plan["cells"], Effort(*plan["effort"])


def records(folder: Path) -> list[Cell]:
    """Every finished cell."""
    path = folder / RECORDS
    return list(read_lines(path)) if path.exists() else []


def record_of(cell: Cell, finished: Iterable[Cell]) -> Cell | None:
    """The last record of ``cell``: the one that has all its sizes."""
    found = [record for record in finished if all(record.get(name) == value for name, value in cell.items())]
    return found[-1] if found else None


def by_process(cells: Iterable[Cell]) -> Iterator[list[Cell]]:
    """Cells that one process measures, in the order of their first ones."""
    groups: dict[tuple[str, Any], list[Cell]] = {}
    for cell in cells:
        module = MODULES[cell["part"]]
        groups.setdefault((module, cell["vocabulary"] if module == "rollout" else None), []).append(cell)
    yield from groups.values()
