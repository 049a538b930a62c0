"""|pi - mu| by token position, mean and largest tenth, against what the token threshold allows there (Fig. 2)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from cppo_verl import core
from cppo_verl.figures.runs import Group, Run
from cppo_verl.methods import MEASURES
from cppo_verl.run.dumps import dumps_of, load

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS, TAIL = 40, 0.1
# Fewer tokens than these say nothing of their largest tenth.
_FEWEST = 20


class ByPosition(NamedTuple):
    """One entry a bin of token positions."""

    position: np.ndarray
    """Middle of the bin, in tokens from 1."""
    mean: np.ndarray
    tail: np.ndarray
    """Mean of the largest tenth."""
    threshold: np.ndarray | None
    """Mean of delta / w_t over the bin's tokens; None for a method without a token threshold on D."""


def by_position(runs: Sequence[Run]) -> ByPosition | None:
    """From the dumped steps of the runs; None where none was dumped or no token was in the loss."""
    columns: list[list[torch.Tensor]] = []
    for run in runs:
        for file in dumps_of(run.folder):
            dump = load(file)
            valid = dump["response_mask"].bool()
            gap = core.binary_tv(dump["log_prob"], dump["rollout_log_prob"])
            columns.append([valid.cumsum(-1)[valid], gap[valid], _threshold(run, dump)[valid]])
    if not columns:
        return None
    whole = [torch.cat(column).double().numpy() for column in zip(*columns, strict=True)]
    position, spread, limit = whole
    if not len(position):
        return None
    edges = np.unique(np.linspace(1, position.max() + 1, BINS + 1).round())
    place = np.digitize(position, edges) - 1
    rows = []
    for number in range(len(edges) - 1):
        inside = place == number
        if inside.sum() < _FEWEST:
            continue
        largest = np.sort(spread[inside])[-max(int(TAIL * inside.sum()), 1) :]
        middle = (edges[number] + edges[number + 1] - 1) / 2
        rows.append((middle, spread[inside].mean(), largest.mean(), limit[inside].mean()))
    if not rows:
        return None
    middle, mean, tail, bound = (np.array(column) for column in zip(*rows, strict=True))
    return ByPosition(middle, mean, tail, None if np.isnan(bound).any() else bound)


def _threshold(run: Run, dump: dict[str, Any]) -> torch.Tensor:
    """delta / w_t, NaN where the method compares no D with a threshold that |pi - mu| could be held against."""
    valid, delta = dump["response_mask"].bool(), run.config.method.get("delta")
    scaled = run.config.method.get("length_reference") is not None  # each response has a delta of its own
    if delta is None or scaled or not MEASURES[run.config.divergence.name].total_variation:
        return torch.full(valid.shape, torch.nan)
    weights = dump.get("weights")
    return torch.full(valid.shape, float(delta)) if weights is None else float(delta) / weights


def draw(axis: "Axes", group: Group, data: ByPosition, colour: str) -> None:
    axis.plot(data.position, data.mean, color=colour, label=r"mean $|\pi - \mu|$")
    axis.plot(data.position, data.tail, color=colour, linestyle="--", label="mean of the largest tenth")
    if data.threshold is not None:
        axis.plot(data.position, data.threshold, color="grey", linestyle=":", label=r"$\delta / w_t$")
    axis.set(title=group.name.replace("$", r"\$"), xlabel="token position", ylabel=r"$|\pi - \mu|$", yscale="log")
    axis.grid(alpha=0.3)
