"""The paper's figures from run folders, as files: several runs overlaid, seeds as their mean with a band."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cppo_verl.figures import curves, mask, positions
from cppo_verl.figures.runs import Group, Run, grouped

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")


def plot_runs(
    folders: Sequence[Path],
    target: Path,
    formats: Sequence[str] = FORMATS,
    say: Callable[[str], None] | None = None,
) -> list[Path]:
    """Draw what the runs have numbers for; a figure without any is not written.

    Args:
        target: folder to write into, made if it is absent.
        formats: of each figure.
        say: is told of a last line of metrics that was cut off.

    Returns:
        The files written.

    Raises:
        ConfigError: one is no run folder, or a file in it is damaged.
    """
    import matplotlib

    matplotlib.use("Agg")
    groups = grouped([Run.read(folder, say) for folder in folders])
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in _figures(groups):
        for kind in formats:
            path = target / f"{name}.{kind}"
            figure.savefig(path, dpi=120)
            written.append(path)
    return written


def _figures(groups: Sequence[Group]) -> Iterator[tuple[str, "Figure"]]:
    yield from _curves("validation", [(panel, groups) for panel in curves.validation_panels(groups)], groups)
    yield from _curves("training", [(panel, groups) for panel in curves.training_panels()], groups)
    yield from _curves("trust_region", [(panel, groups) for panel in curves.trust_region_panels()], groups)
    yield from _curves("ablations", curves.ablation_panels(groups), groups)
    yield from _positions(groups)
    if len(groups) == 1:
        figure = _figure(10, 4)
        if mask.draw(figure, groups[0].runs[0]):
            yield "mask", figure


def _curves(
    name: str, panels: Sequence[tuple[curves.Panel, Sequence[Group]]], groups: Sequence[Group]
) -> Iterator[tuple[str, "Figure"]]:
    """A grid of panels; those without a number are left out."""
    colours = _colours(groups)
    shown = [(panel, chosen) for panel, chosen in panels if panel.has_numbers(chosen)]
    if not shown:
        return
    columns = math.ceil(len(shown) / 2) if len(shown) > 2 else len(shown)
    rows = math.ceil(len(shown) / columns)
    figure = _figure(4.8 * columns, 3.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (panel, chosen) in zip(axes.flat, shown, strict=False):
        curves.draw(axis, panel, chosen, colours)
        if name == "ablations":
            axis.legend(fontsize="small", loc="lower right")
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_visible(False)
    if len(groups) > 1 and name != "ablations":
        _shared_legend(figure, columns)
    yield name, figure


def _shared_legend(figure: "Figure", columns: int) -> None:
    """One legend under all panels: their lines have the same names."""
    entries: dict[str, Artist] = {}
    for axis in figure.axes:
        entries |= {str(label): handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns, fontsize="small")


def _positions(groups: Sequence[Group]) -> Iterator[tuple[str, "Figure"]]:
    found = [(group, data) for group in groups if (data := positions.by_position(group.runs)) is not None]
    if not found:
        return
    colours = _colours(groups)
    figure = _figure(4.8 * len(found), 3.6)
    axes = figure.subplots(1, len(found), squeeze=False, sharey=True)
    for axis, (group, data) in zip(axes.flat, found, strict=True):
        positions.draw(axis, group, data, colours[group.label])
    _shared_legend(figure, columns=3)
    yield "positions", figure


def _colours(groups: Sequence[Group]) -> dict[str, str]:
    return {group.label: curves.COLOURS[place % len(curves.COLOURS)] for place, group in enumerate(groups)}


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
